"""Raise on every rank an error that happens on one, such as a full disk on rank 0, so that no rank waits for another."""

from collections.abc import Callable
from typing import TypeVar

from phimini.parallel.ranks.world import World

T = TypeVar("T")

_RAISED_ON_ALL = (ValueError, OSError, ImportError)


def on_every(world: World, action: Callable[[], T]) -> T:
    """Run `action` on every rank and return its result; raise an OSError, ValueError or ImportError of any rank on all. Collective.

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
    """Run `action` on rank 0 and return its result on every rank. Raises as `on_every`. Collective."""
    result = on_every(world, action) if world.is_main else on_every(world, lambda: None)
    return world.broadcast_object(result)  # pyright: ignore[reportReturnType]
