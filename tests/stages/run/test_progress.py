"""Progress of a stage on a terminal and elsewhere."""

import io
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from phimini.stages.run import progress
from phimini.stages.run.metrics import MetricsLog
from phimini.stages.run.progress import LINE_EVERY_S, StepProgress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace the clock by one that the test moves."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_elsewhere_than_on_a_terminal_there_is_a_line_every_few_seconds(
    clock: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl", 40, "sft", is_main=True) as log:
        for step in range(40):
            clock[0] += 0.5
            validation = 0.25 if step == 3 else None
            log.write(step, tokens=5000, loss=0.123456, lr=4e-3, zero_groups=2, validation_loss=validation)  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0]
        == "sft 1/40  loss 0.1235  lr 0.004  zero_groups 2  10,000 tokens/s  0.50 s  20 s left"
    )
    assert lines[3] == (
        "sft 13/40  loss 0.1235  lr 0.004  zero_groups 2  validation_loss 0.25  10,000 tokens/s  0.50 s  14 s left"
    ), "the validation loss of step 4 is not lost"
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [1, 2, 3, 13, 23, 33, 40]


def test_the_log_of_a_run_like_the_demo_stays_below_300_lines(
    clock: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """3,900 steps in four stages of 0.15 s, and 40 of 4 s, as `phimini recipe tiny` takes on two cores."""
    for stage, steps, seconds in (("midtrain", 3200, 0.15), ("sft", 625, 0.15), ("rollout_dpo", 80, 0.3), ("rlvr", 40, 4.0)):  # fmt: skip
        with MetricsLog(tmp_path / stage / "metrics.jsonl", steps, stage, is_main=True) as log:
            for step in range(steps):
                clock[0] += seconds
                log.write(step, tokens=1, loss=1.0)
    assert 100 < len(capsys.readouterr().out.splitlines()) < 200


def test_a_stage_that_ends_early_shows_its_last_step(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    bar = StepProgress(total=100, label="midtrain")
    for done in range(1, 6):
        clock[0] += 0.5
        bar.update(done)
    bar.close()
    bar.close()
    steps = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert steps == ["1/100", "2/100", "3/100", "5/100"]


def test_time_left_of_a_resumed_stage_counts_only_this_run(clock: list[float]) -> None:
    stream = io.StringIO()
    bar = StepProgress(total=1000, label="rlvr", stream=stream)
    for done in (901, 902):
        clock[0] += 50.0
        bar.update(done)
    assert stream.getvalue().splitlines()[-1] == "rlvr 902/1000  1 h 21 min left"


def test_a_disabled_one_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    bar = StepProgress(total=3, label="sft", enabled=False)
    bar.update(1, {"loss": 1.0})
    bar.close()
    assert capsys.readouterr() == ("", "")


TERMINAL_STAGE = """
import sys, time
from phimini.stages.run import progress
now = [1000.0]
progress.time.perf_counter = lambda: now[0]
bar = progress.StepProgress(total=1000, label="sft")
first, last, every = map(int, sys.argv[1:4])
for done in range(first, last + 1):
    now[0] += 30.0
    bar.update(done, {"loss": 0.5, "zero_groups": done}, "2,000 tokens/s  30.00 s")
    if every and done % every == 0:
        print(f"checkpoint {done}")
bar.close()
"""


def shown_on_a_terminal(
    columns: int, *arguments: int, term: str = "xterm"
) -> tuple[list[str], str]:
    """Return the lines of a terminal after a stage in another process, and all text sent to the terminal."""
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
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TERMINAL_STAGE, *map(str, arguments)], stdout=writer, check=True, timeout=120,
        env={k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")} | {"COLUMNS": str(columns), "TERM": term},
    )  # fmt: skip
    os.close(writer)
    thread.join(timeout=10)
    os.close(reader)
    text = b"".join(pieces).decode()
    # rich erases the line that it is in and draws it again; colours do not count here.
    plain = re.sub(r"\x1b\[[0-9;?]*[mlhA]", "", text.replace("\r\n", "\n"))
    lines = [re.split(r"\x1b\[2K", line)[-1].strip("\r ") for line in plain.split("\n")]
    return [line for line in lines if line], text


def test_a_terminal_shows_prints_above_one_bar_with_the_latest_values() -> None:
    lines, text = shown_on_a_terminal(120, 901, 904, 2)
    assert lines[:2] == ["checkpoint 902", "checkpoint 904"], lines
    (bar,) = [line for line in lines if line.startswith("sft")]
    assert re.fullmatch(
        r"sft [━╸╺ ]+ 904/1000 2,000 tokens/s  30.00 s 0:48:00 loss 0.5  zero_groups 904", bar
    ), bar
    assert text.count("901/1000") >= 1, "the bar is drawn after the first step"


def test_a_bar_fits_a_narrow_terminal() -> None:
    lines, _ = shown_on_a_terminal(40, 1, 3, 0)
    assert len(lines) == 1 and len(lines[0]) <= 40, lines


def test_a_dumb_terminal_gets_lines() -> None:
    lines, text = shown_on_a_terminal(120, 1, 3, 0, term="dumb")
    assert "\x1b" not in text
    assert [line.split()[1] for line in lines] == ["1/1000", "2/1000", "3/1000"]


def test_a_line_waits_for_its_time(clock: list[float]) -> None:
    stream = io.StringIO()
    bar = StepProgress(total=10, label="sft", stream=stream)
    for done in (1, 2, 3):
        bar.update(done)
    clock[0] += LINE_EVERY_S - 0.01
    bar.update(4)
    assert len(stream.getvalue().splitlines()) == 3
    clock[0] += 0.01
    bar.update(5)
    assert len(stream.getvalue().splitlines()) == 4
