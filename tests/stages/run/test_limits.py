"""An exhausted limit of process or machine is one line with the command that raises it, in our process and in a rank's."""

import os
import re
import resource
import threading
from pathlib import Path

import pytest
import torch
from forked_ranks import run_ranks

from phimini.stages import cli
from phimini.stages.cli import main
from phimini.stages.run.limits import OPEN_FILES_OF_RANKS, limit_behind


def open_many(verb: str, settings: object) -> int:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 128))
    files = [open(os.devnull) for _ in range(100)]
    return len(files)


def allocate(verb: str, settings: object) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (64 << 30, 64 << 30))
    return len(bytearray(1 << 40))


def allocate_tensor(verb: str, settings: object) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (64 << 30, 64 << 30))
    return len(torch.zeros(1 << 40))


def start_thread(verb: str, settings: object) -> int:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (open_many, "Too many open files: '/dev/null'; raise the limit of open files, ulimit -n: it is 64, up to 128 without root"),
        (allocate, "phimini: MemoryError; raise the limit of KiB of address space, ulimit -v: it is 67,108,864, up to 67,108,864"),
        (allocate_tensor, "can't allocate memory: you tried to allocate 4398046511104 bytes"),
        (start_thread, "raise the limit of processes and threads of this user, ulimit -u: it is "),
    ],
)  # fmt: skip
def test_the_limit_is_named_in_one_line(
    function, message: str, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "function_of", lambda path: function)
    assert run_ranks(main, 1, ["doctor", "--dist"]) == [1]  # forked: limits stay lowered
    error = capfd.readouterr().err
    assert message in error and "; raise the limit of" in error and error.count("\n") == 1


def too_few_files() -> None:
    del os.environ["RANK"]
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES_OF_RANKS - 1, OPEN_FILES_OF_RANKS))
    assert main(["recipe", "tiny", "out=never", "processes=2"]) == 1


def test_a_run_of_several_ranks_asks_first_for_the_files_that_it_opens(
    capfd: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_ranks(too_few_files, 1)
    assert (
        "several ranks need more than 64; raise the limit of open files, ulimit -n: it is 63, up to 64"
        in capfd.readouterr().err
    )
    assert not list(tmp_path.iterdir())


def test_without_a_limit_the_machines_memory_is_named() -> None:
    assert "the machine has " in (limit_behind("MemoryError", "") or "")
    assert "sysctl" in (limit_behind("OSError", "[Errno 23] Too many open files in system") or "")


def test_a_full_disk_behind_no_file_is_named() -> None:
    error = OSError(28, "No space left on device")
    assert re.fullmatch(
        r"free for shared memory and temporary files: [\d,]+ bytes in /dev/shm, [\d,]+ bytes in \S+",
        limit_behind("OSError", str(error)) or "",
    )


@pytest.mark.parametrize("error", [ValueError("bad"), OSError(28, "No space left on device", "run/x"), threading.BrokenBarrierError()])  # fmt: skip
def test_other_errors_name_no_limit(error: Exception) -> None:
    assert limit_behind(type(error).__name__, str(error)) is None
