"""Output that cannot be written or encoded; whole runs with it are in test_stopped_outside_steps.py."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from forked_ranks import run_ranks

from phimini.stages.cli import main
from phimini.stages.run.output import LastingStream


def pipe_without_reader() -> io.TextIOWrapper:
    read, write = os.pipe()
    os.close(read)
    return open(write, "w")


@pytest.mark.parametrize("opened", [pipe_without_reader, lambda: open("/dev/full", "w")], ids=["closed pipe", "full"])  # fmt: skip
def test_a_failed_write_is_told_once_and_nothing_is_raised(opened) -> None:
    told = io.StringIO()
    with opened() as stream:
        lasting = LastingStream(stream, "standard output", told=told)
        for _ in range(3):
            print("x" * 100_000, file=lasting, flush=True)
    assert isinstance(lasting.lost, OSError)
    assert (
        told.getvalue()
        == f"phimini: standard output: {lasting.lost.strerror}; what follows is not shown\n"
    )


def test_what_an_encoding_lacks_is_a_question_mark(tmp_path: Path) -> None:
    with open(tmp_path / "log", "w", encoding="latin-1") as stream:
        print("█ é", file=LastingStream(stream, "standard output"))
    assert (tmp_path / "log").read_text("latin-1") == "? é\n"


@pytest.mark.parametrize("words", [["--help"], ["plan", "tiny"], ["bench"], ["recipe", "tiny", "--dry-run", "processes=1"]], ids=lambda words: words[0])  # fmt: skip
def test_a_command_that_only_prints_fails_when_it_cannot(
    words: list[str], capfd: pytest.CaptureFixture
) -> None:
    def run() -> int:
        with open("/dev/full", "w") as full:
            os.dup2(full.fileno(), 1)
        sys.stdout = open(1, "w")
        return main(words)

    assert run_ranks(run, 1) == [1]
    told = "phimini: standard output: No space left on device; what follows is not shown"
    assert capfd.readouterr().err.count(told) == 1


def test_the_interpreter_ends_as_the_command_does() -> None:
    """Text left in the buffer would make Python exit with status 120 and another message."""
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-W", "ignore", "-m", "phimini.stages.cli", "--help"], stdout=full,
                              stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert done.returncode == 1
    assert (
        done.stderr
        == "phimini: standard output: No space left on device; what follows is not shown\n"
    )
