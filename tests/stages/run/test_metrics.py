"""The metrics file of a stage: its rows, and its repair after a crash."""

import json
import os
import resource
import traceback
from pathlib import Path

import pytest
import torch

from phimini.parallel.ranks.timing import phase, recording
from phimini.stages.run import metrics
from phimini.stages.run.metrics import MetricsLog


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace the clock by one that the test moves."""
    now = [1000.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    return now


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_row_holds_plain_numbers_and_the_measured_speed(
    tmp_path: Path, clock: list[float]
) -> None:
    with MetricsLog(tmp_path / "sft" / "metrics.jsonl", 10, "sft", is_main=True) as log:
        clock[0] += 2.0
        log.write(
            0, tokens=500, loss=torch.tensor(0.5), lr=1e-3, zero_groups=3, validation_loss=None
        )
        clock[0] += 0.5
        log.write(
            1, tokens=500, loss=float("nan"), grad_norm=torch.tensor([float("inf")]), done=True
        )
    assert rows_of(log.path) == [
        {"step": 0, "loss": 0.5, "lr": 1e-3, "zero_groups": 3, "tokens": 500, "tokens_per_second": 250.0, "seconds": 2.0},
        {"step": 1, "loss": None, "grad_norm": None, "done": 1, "tokens": 500, "tokens_per_second": 1000.0, "seconds": 0.5},
    ]  # fmt: skip


def test_a_row_holds_the_time_for_which_the_host_waited(tmp_path: Path, clock: list[float]) -> None:
    with MetricsLog(tmp_path / "rlvr" / "metrics.jsonl", 2, "rlvr", is_main=True) as log:
        for seconds in (3.0, 4.0):
            with phase("rollout"):
                clock[0] += seconds
                with phase("verify"):
                    clock[0] += 0.5
            with phase("forward"):
                clock[0] += 1.0
            assert not recording(), (
                "the time alone: work is not counted, which a GPU would wait for"
            )
            log.write(0 if seconds == 3.0 else 1, tokens=0)
    assert [(row["seconds"], row["rollout_seconds"], row["verify_seconds"]) for row in rows_of(log.path)] == [
        (4.5, 3.0, 0.5), (5.5, 4.0, 0.5)
    ]  # fmt: skip
    assert "forward_seconds" not in rows_of(log.path)[0]


def test_only_rank_0_writes_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl", 10, "sft", is_main=False) as log:
        log.write(0, tokens=500, loss=0.5)
    assert not list(tmp_path.iterdir()) and capsys.readouterr() == ("", "")


def test_a_run_that_goes_on_cuts_what_it_does_again(tmp_path: Path, clock: list[float]) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, 10, "sft", is_main=True) as log:
        for step in range(5):
            clock[0] += 1.0
            log.write(step, tokens=100, loss=1.0)
    with path.open("a") as file:
        file.write('{"step": 5, "lo')  # a crash in the middle of a row
    kept = len(
        b"".join(path.read_bytes().splitlines(True)[:3])
    )  # the last checkpoint was after step 2
    with MetricsLog(path, 10, "sft", is_main=True, kept_bytes=kept) as log:
        for step in (3, 4, 5):
            clock[0] += 1.0
            log.write(step, tokens=100, loss=2.0)
    assert [(row["step"], row["loss"]) for row in rows_of(path)] == [
        (0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)
    ]  # fmt: skip


def test_a_stage_done_anew_starts_an_empty_file(tmp_path: Path) -> None:
    for loss in (1.0, 2.0):
        with MetricsLog(tmp_path / "metrics.jsonl", 10, "sft", is_main=True) as log:
            log.write(0, tokens=1, loss=loss)
            log.write(1, tokens=1, loss=loss)
    assert [(row["step"], row["loss"]) for row in rows_of(log.path)] == [(0, 2.0), (1, 2.0)]


def test_a_killed_process_loses_no_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        with MetricsLog(path, 10, "sft", is_main=True) as log:
            for step in range(3):
                log.write(step, tokens=1, loss=1.0)
            os.kill(os.getpid(), 9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
    assert [row["step"] for row in rows_of(path)] == [0, 1, 2]


def test_a_full_disk_is_an_error_and_the_rows_before_stay(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    pid = os.fork()
    if pid == 0:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            with MetricsLog(path, 100, "sft", is_main=True) as log:
                with pytest.raises(OSError, match=r"cannot write: .*metrics\.jsonl"):
                    for step in range(100):
                        log.write(step, tokens=1, loss=1.0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0, "see the child's traceback"
    whole = path.read_bytes().rpartition(b"\n")
    kept = len(whole[0] + whole[1])
    with MetricsLog(path, 100, "sft", is_main=True, kept_bytes=kept) as log:
        log.write(100, tokens=1)
    steps = [row["step"] for row in rows_of(path)]
    assert steps == [*range(len(steps) - 1), 100] and len(steps) > 5
