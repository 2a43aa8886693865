"""Background work of rank 0, such as sampling the next step's answers while every rank trains on this step's."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from phimini.parallel.ranks.world import World

T = TypeVar("T")


class Background(Generic[T]):
    """An action that runs in a thread of rank 0, with a collective result.

    The action may not communicate with the other ranks. told: turns its result into that of the other ranks.
    """

    def __init__(self, world: World, action: Callable[[], T], told: Callable[[T], T]) -> None:
        self._world, self._action, self._told = world, action, told
        self._outcome: tuple[T | None, Exception | None] = (None, None)
        self._thread: threading.Thread | None = None
        self._known = False
        if world.is_main:
            self._thread = threading.Thread(target=self._run, name="rollouts", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        try:
            self._outcome = (self._action(), None)
        except (RuntimeError, ValueError, OSError) as error:
            self._outcome = (None, error)

    def result(self) -> T:
        """Wait for the action; return its result, or raise its error. May be called again. Collective."""
        if not self._known:
            if self._thread is not None:
                self._thread.join()
            result, error = self._outcome
            told = None if result is None else self._told(result)
            outcome = self._world.broadcast_object((told, error))
            if not self._world.is_main:
                self._outcome = outcome
            self._known = True
        result, error = self._outcome
        if error is not None:
            raise error
        return result  # pyright: ignore[reportReturnType]
