"""One step off: rank 0 samples the next step's answers in a thread while every rank trains on this step's."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from phimini.model.sampler import SamplingParams
from phimini.parallel.megatron.builder import Model
from phimini.parallel.ranks.world import World
from phimini.stages.rollout.engine import RolloutEngine, Sampled
from phimini.stages.rollout.separate_vllm import SeparateVllm

T = TypeVar("T")


class Background(Generic[T]):
    """Rank 0 does something in a thread while all ranks train; `result` is collective.

    What it does may not communicate with the other ranks.
    """

    def __init__(self, world: World, action: Callable[[], T]) -> None:
        self._world, self._action = world, action
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
        """What `action` returned on rank 0, on every rank; what it raised too. May be asked again."""
        if not self._known:
            if self._thread is not None:
                self._thread.join()
            self._outcome = self._world.broadcast_object(self._outcome)
            self._known = True
        result, error = self._outcome
        if error is not None:
            raise error
        return result  # pyright: ignore[reportReturnType]


class OnMain:
    """The engine as rank 0's thread may use it: it samples, and talks to no other rank."""

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine

    @property
    def _separate(self) -> SeparateVllm:
        assert isinstance(self._engine, SeparateVllm), (
            "RunConfig allows no other asynchronous engine"
        )
        return self._engine

    def generate(
        self, prompts: list[list[int]], params: SamplingParams, seeds: list[int]
    ) -> list[Sampled]:
        return self._separate.generate_here(prompts, params, seeds)

    def generate_groups(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        seeds: list[int],
        groups: list[str],
        wanted: int | None,
    ) -> Sequence[Sampled | None]:
        return self._separate.groups_here(prompts, params, seeds, groups, wanted)

    def load(self, directory: Path) -> None:
        raise RuntimeError("the thread beside the training changes no weights")

    def sync(self, model: Model) -> None:
        raise RuntimeError("the thread beside the training changes no weights")

    def rest(self) -> None:
        pass

    def reset_prefix_cache(self) -> None:
        pass
