"""Time and work of each phase of a step, from marks in the code that are nearly free without a recorder.

    with Recorder(device) as recorder:
        midtrain(run, world)
    recorder.steps[5].wall_s["backward"]

Phases are exclusive: time inside a nested phase counts for the nested phase alone, so the phases of a step add up to
the step. Time outside every mark is `other`. Other threads than the recorder's (rollout prefetch) are not recorded.
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
    """Seconds and counts of one rank's step, from the end of the previous step."""

    wall_s: Counter[str] = field(default_factory=Counter)
    """seconds by phase"""
    cpu_s: Counter[str] = field(default_factory=Counter)
    """CPU seconds of this process by phase"""
    counts: Counter[str] = field(default_factory=Counter)
    """sums of `count`: tokens, flops, ..."""


class Recorder:
    """A context manager that records this thread's marks. `steps` holds the finished steps."""

    def __init__(
        self,
        device: torch.device,
        between_steps: Callable[[int], None] | None = None,
        *,
        counts: bool = True,
    ) -> None:
        """between_steps(n): called after n steps are done; its time is not recorded. counts: False for the time alone."""
        self.steps: list[Step] = []
        self.counts = counts
        self.exact = True
        """On a GPU: synchronise at every mark. Phases are then exact, but nothing overlaps and steps take longer. If
        False, only the sum of a step's phases is meaningful."""
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
        """Begin a phase, one of PHASES."""
        assert name in PHASES, name
        self._credit()
        self._names.append(name)

    def leave(self) -> None:
        """End the current phase."""
        self._credit()
        self._names.pop()

    def count(self, name: str, amount: float) -> None:
        """Add to a count of the current step."""
        self._step.counts[name] += amount  # pyright: ignore[reportArgumentType]

    def so_far(self) -> Counter[str]:
        """Return the wall seconds of the current step by phase."""
        self._credit()
        return self._step.wall_s

    def step_done(self) -> None:
        """End the current step and append it to `steps`."""
        self._credit(wait=True)
        self.steps.append(self._step)
        self._step = Step()
        if self._between_steps is not None:
            self._between_steps(len(self.steps))
            self._since = self._now(wait=True)

    def _now(self, wait: bool) -> tuple[float, float]:
        # Kernels run asynchronously; without this their time would count for the next phase.
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
    """Mark a block, or a function as `@phase("data")`, as one phase of the step."""
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
    """Return True if a recorder that counts work is active in this thread."""
    recorder = _recorder.get()
    return recorder is not None and recorder.counts


def count(name: str, amount: float) -> None:
    """Add `amount` to the active recorder's count `name` of this step."""
    recorder = _recorder.get()
    if recorder is not None:
        recorder.count(name, amount)


@contextmanager
def host_times() -> Iterator[Recorder]:
    """Record a loop's steps, without waiting for a GPU, unless a recorder is active: then that one is given."""
    recorder = _recorder.get()
    if recorder is not None:
        yield recorder
        return
    with Recorder(torch.device("cpu"), counts=False) as recorder:
        yield recorder


def step_done() -> None:
    """End the recorder's step. The log of a stage calls this once per step, on every rank."""
    recorder = _recorder.get()
    if recorder is not None:
        recorder.step_done()
