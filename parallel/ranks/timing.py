"""Where a step's time goes: marks in the code that stages run, which cost next to nothing until a recorder listens.

    with Recorder(device) as recorder:
        midtrain(run, world)
    recorder.steps[5].wall_s["backward"]

A phase is exclusive: time inside a nested one is the nested one's alone, so a step's phases add up to the step.
What no mark claims is `other`. Threads beside the training (rollouts that run ahead) are not recorded.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field

import torch

PHASES = ("data", "forward", "head", "backward", "communication", "optimizer", "rollout", "verify", "sync", "other")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Step:
    """One rank's step, from the end of the step before."""

    wall_s: Counter[str] = field(default_factory=Counter)
    """by phase"""
    cpu_s: Counter[str] = field(default_factory=Counter)
    """by phase, of this process"""
    counts: Counter[str] = field(default_factory=Counter)
    """what `count` was told: tokens, flops, ..."""


class Recorder:
    """Listens, as a context manager, to this thread's marks. `steps` has those finished so far."""

    def __init__(
        self, device: torch.device, between_steps: Callable[[int], None] | None = None
    ) -> None:
        """between_steps(n): called after n steps are done, outside of anybody's time."""
        self.steps: list[Step] = []
        self.exact = True
        """on a GPU: wait for it at every mark. Phases are then right, but nothing overlaps and steps take longer;
        without, only the sum of a step's phases means anything"""
        self._cuda = device.type == "cuda"
        self._between_steps = between_steps
        self._names = ["other"]
        self._step = Step()
        self._since = (0.0, 0.0)
        self._token: Token[Recorder | None] | None = None

    def __enter__(self) -> "Recorder":
        self._token = _recorder.set(self)
        self._since = self._now(wait=True)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._token is not None
        _recorder.reset(self._token)

    def enter(self, name: str) -> None:
        assert name in PHASES, name
        self._credit()
        self._names.append(name)

    def leave(self) -> None:
        self._credit()
        self._names.pop()

    def count(self, name: str, amount: float) -> None:
        self._step.counts[name] += amount  # pyright: ignore[reportArgumentType]

    def step_done(self) -> None:
        self._credit(wait=True)
        self.steps.append(self._step)
        self._step = Step()
        if self._between_steps is not None:
            self._between_steps(len(self.steps))
            self._since = self._now(wait=True)

    def _now(self, wait: bool) -> tuple[float, float]:
        # Kernels run behind the code that starts them; without this their time would be the next phase's.
        if self._cuda and wait:
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def _credit(self, wait: bool = False) -> None:
        wall, cpu = self._now(wait or self.exact)
        name = self._names[-1]
        self._step.wall_s[name] += wall - self._since[0]  # pyright: ignore[reportArgumentType]
        self._step.cpu_s[name] += cpu - self._since[1]  # pyright: ignore[reportArgumentType]
        self._since = (wall, cpu)


_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Also a decorator: `@phase("data")`."""
    recorder = _recorder.get()
    if recorder is None:
        yield
        return
    recorder.enter(name)
    try:
        yield
    finally:
        recorder.leave()


def recording() -> bool:
    return _recorder.get() is not None


def count(name: str, amount: float) -> None:
    """Adds to the step's work."""
    recorder = _recorder.get()
    if recorder is not None:
        recorder.count(name, amount)


def step_done() -> None:
    """Called by the log of a stage, once per step, on every rank."""
    recorder = _recorder.get()
    if recorder is not None:
        recorder.step_done()
