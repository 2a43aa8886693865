"""Metrics of a stage: what is in the file after a crash, and what a person sees."""

import json
import os
import pty
import re
import resource
import threading
import traceback
from pathlib import Path

import pytest
import torch

from phimini.stages.run import metrics
from phimini.stages.run.metrics import MetricsLog, ProgressBar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, moved by hand."""
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
    with MetricsLog(path, 10, "sft", is_main=True) as log:  # the last checkpoint was after step 2
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


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "tokens": 1, "seconds": 1.0}\nrubbish\n')
    with MetricsLog(tmp_path / "metrics.jsonl", 10, "sft", is_main=True) as log:
        with pytest.raises(
            ValueError, match=r"metrics\.jsonl, line 2: not a row of metrics: b'rubbish'"
        ):
            log.write(5, tokens=1)


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
    with MetricsLog(path, 100, "sft", is_main=True) as log:
        log.write(100, tokens=1)
    steps = [row["step"] for row in rows_of(path)]
    assert steps == [*range(len(steps) - 1), 100] and len(steps) > 5


def test_a_log_without_a_terminal_is_one_line_per_step(
    tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl", 400, "sft", is_main=True) as log:
        for step in range(2):
            clock[0] += 0.5
            log.write(step, tokens=5000, loss=0.123456, lr=4e-3, zero_groups=2)
    assert capsys.readouterr().out == (
        "sft 1/400  loss 0.1235  lr 0.004  zero_groups 2  10,000 tokens/s  0.50 s\n"
        "sft 2/400  loss 0.1235  lr 0.004  zero_groups 2  10,000 tokens/s  0.50 s\n"
    )


def screen_after(write, columns: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], str]:
    """The lines that a terminal shows after `write(stream)`, and all that was sent to it."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    reader, writer = pty.openpty()
    pieces: list[bytes] = []

    def read() -> None:
        try:
            while piece := os.read(reader, 1 << 16):
                pieces.append(piece)
        except OSError:  # the writing side was closed
            return

    thread = threading.Thread(target=read)
    thread.start()
    with os.fdopen(writer, "w", encoding="utf-8") as stream:
        write(stream)
    thread.join(timeout=10)
    os.close(reader)
    text = b"".join(pieces).decode()
    # `\r ESC[K` erases the line it stands in: that is all the terminal there is.
    return [line.split("\r\x1b[K")[-1].rstrip("\r") for line in text.split("\n")], text


def test_a_terminal_shows_the_lines_above_one_bar(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(stream) -> None:
        bar = ProgressBar(total=8, label="sft", stream=stream)
        for done in range(1, 5):
            clock[0] += 30.0
            bar.say(f"line {done}")
            bar.advance(done, tokens=60_000)
        bar.close()

    lines, text = screen_after(write, 100, monkeypatch)
    assert lines == [
        "line 1", "line 2", "line 3", "line 4",
        "sft ████████████░░░░░░░░░░░░ 4/8  2,000 tokens/s  2 min 00 s left", "",
    ]  # fmt: skip
    assert len(re.findall("█", text)) > 12, "the bar is drawn after every step"


def test_time_left_of_a_run_that_goes_on_counts_only_this_run(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(stream) -> None:
        bar = ProgressBar(total=1000, label="rlvr", stream=stream)
        for done in (901, 902):
            clock[0] += 50.0
            bar.advance(done, tokens=100)
        bar.close()

    lines, _ = screen_after(write, 100, monkeypatch)
    assert lines[0].endswith("902/1000  2 tokens/s  1 h 21 min left")


def test_a_bar_fits_a_narrow_terminal(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    def write(stream) -> None:
        bar = ProgressBar(total=3, label="midtrain", stream=stream)
        clock[0] += 1.0
        bar.advance(1, tokens=10)
        bar.close()

    lines, _ = screen_after(write, 20, monkeypatch)
    assert len(lines[0]) == 19
