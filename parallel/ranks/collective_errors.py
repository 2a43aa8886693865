"""Errors that one rank meets and all must raise: a full disk on rank 0 may not leave the others waiting."""

from collections.abc import Callable
from typing import TypeVar

from phimini.parallel.ranks.world import World

T = TypeVar("T")

_RAISED_ON_ALL = (ValueError, OSError, ImportError)


def on_every(world: World, action: Callable[[], T]) -> T:
    """`action()` on every rank; an OSError, ValueError or ImportError on any of them is raised on all. Collective.

    `action` must not communicate: a rank that fails in it leaves early.
    """
    result, error = None, None
    try:
        result = action()
    except _RAISED_ON_ALL as e:
        error = e
    mine = None
    if error is not None:
        kind = next(i for i, kind in enumerate(_RAISED_ON_ALL) if isinstance(error, kind))
        mine = kind, str(error)
    for report in world.all_gather_objects(mine):
        if report is not None:
            kind, message = report
            raise _RAISED_ON_ALL[kind](message) from error
    return result  # pyright: ignore[reportReturnType]


def on_main(world: World, action: Callable[[], T]) -> T:
    """`action()` on rank 0 alone, and what it returned on every rank; errors as in `on_every`."""
    result = on_every(world, action) if world.is_main else on_every(world, lambda: None)
    return world.broadcast_object(result)  # pyright: ignore[reportReturnType]
