"""Phases of a recorder are exclusive and add up to the step; without a recorder the marks have no effect."""

import threading
import time

import pytest
import torch

from phimini.parallel.ranks import timing
from phimini.parallel.ranks.timing import Recorder, count, phase, recording, step_done

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace the clocks: `clock[0]` is the time in wall seconds; the CPU is busy for half of it."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "process_time", lambda: now[0] / 2)
    return now


def spend(clock: list[float], seconds: float) -> None:
    clock[0] += seconds


def test_a_nested_phase_s_time_is_its_own(clock: list[float]) -> None:
    with Recorder(CPU) as recorder:
        spend(clock, 1)
        with phase("backward"):
            spend(clock, 2)
            with phase("forward"):
                spend(clock, 4)
                with phase("forward"):
                    spend(clock, 8)
            spend(clock, 16)
        spend(clock, 32)
        step_done()
        with phase("data"):
            spend(clock, 64)
        step_done()
    first, second = recorder.steps
    assert first.wall_s == {"other": 33, "backward": 18, "forward": 12}
    assert first.cpu_s == {"other": 16.5, "backward": 9, "forward": 6}
    assert second.wall_s == {"data": 64, "other": 0}


def test_a_phase_that_raises_ends(clock: list[float]) -> None:
    with Recorder(CPU) as recorder:
        with pytest.raises(KeyError), phase("data"):
            spend(clock, 1)
            raise KeyError
        spend(clock, 2)
        step_done()
    assert recorder.steps[0].wall_s == {"data": 1, "other": 2}


def test_work_is_counted_per_step_and_what_happens_between_steps_is_not_timed(
    clock: list[float],
) -> None:
    with Recorder(CPU, lambda done: spend(clock, 1000 * done)) as recorder:
        count("tokens", 3)
        count("tokens", 4)
        step_done()
        spend(clock, 1)
        step_done()
    assert [step.counts["tokens"] for step in recorder.steps] == [7, 0]
    assert recorder.steps[1].wall_s == {"other": 1}


def test_other_threads_are_not_recorded(clock: list[float]) -> None:
    def work() -> None:
        assert not recording()
        with phase("rollout"):
            spend(clock, 5)
        count("tokens", 1)

    with Recorder(CPU) as recorder:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        step_done()
    assert recorder.steps[0].wall_s == {"other": 5} and not recorder.steps[0].counts


def test_without_a_recorder_marks_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing.time, "perf_counter", lambda: pytest.fail("the clock was read"))
    with phase("no such phase"):
        count("tokens", 1)
        step_done()
    assert not recording()
