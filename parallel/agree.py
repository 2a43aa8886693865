"""Errors that one rank meets and all must raise: a full disk on rank 0 may not leave the others waiting."""

from collections.abc import Callable
from typing import TypeVar

from phimini.parallel.world import World

T = TypeVar("T")


def on_every(world: World, action: Callable[[], T]) -> T:
    """`action()` on every rank; an OSError or ValueError on any of them is raised on all. Collective.

    `action` must not communicate: a rank that fails in it leaves early.
    """
    result, error = None, None
    try:
        result = action()
    except (OSError, ValueError) as e:
        error = e
    reports = world.all_gather_objects(
        None if error is None else (isinstance(error, ValueError), str(error))
    )
    for report in reports:
        if report is not None:
            is_value_error, message = report
            raise (ValueError if is_value_error else OSError)(message) from error
    return result  # pyright: ignore[reportReturnType]


def on_main(world: World, action: Callable[[], T]) -> T:
    """`action()` on rank 0 alone, and what it returned on every rank; errors as in `on_every`."""
    result = on_every(world, action) if world.is_main else on_every(world, lambda: None)
    return world.broadcast_object(result)  # pyright: ignore[reportReturnType]
