"""Two commands in one folder: the second is refused with the first one's name, until the first one's process ends."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from forked_ranks import run_ranks

from phimini.stages.cli import main
from phimini.stages.run.lock import LOCK_FILE, RunLock

HOLDER = """
import os, subprocess, sys, time
from phimini.stages.run.lock import RunLock
lock = RunLock(sys.argv[1])
lock.acquire()
if sys.argv[2] == "fork" and os.fork() == 0:
    os.close(1)
    time.sleep(60)
if sys.argv[2] == "exec":
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False, stdout=subprocess.DEVNULL)
if sys.argv[2] == "child ended" and os.fork() == 0:
    os._exit(0)
print("taken", flush=True)
time.sleep(60)
"""


def holder(out: Path, child: str) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", HOLDER, str(out), child],
                               stdout=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "taken\n"
    return process


@pytest.mark.parametrize("child", ["none", "fork", "exec", "child ended"])
def test_it_is_held_while_its_process_lives_and_not_by_its_children(
    child: str, tmp_path: Path
) -> None:
    process = holder(tmp_path, child)
    try:
        refusal = rf"{tmp_path} is in use by process {process.pid} on {socket.gethostname()}: "
        with pytest.raises(OSError, match=refusal):
            RunLock(tmp_path).acquire(wait_s=0.2)
        process.kill()
        process.wait()
        if child in ("fork", "exec"):
            os.killpg(
                process.pid, 0
            )  # raises if the child is gone, which makes this test one of nothing
        with RunLock(tmp_path):
            assert (tmp_path / LOCK_FILE).read_text() == f"process {os.getpid()} on {socket.gethostname()}"  # fmt: skip
    finally:
        os.killpg(process.pid, signal.SIGKILL) if child in ("fork", "exec") else process.kill()


def test_a_run_that_is_ending_is_waited_for(tmp_path: Path) -> None:
    first = RunLock(tmp_path)
    first.acquire()
    timer = threading.Timer(0.3, first.release)
    timer.start()
    began = time.monotonic()
    with RunLock(tmp_path):
        assert 0.2 < time.monotonic() - began < 4


def test_a_fork_of_rank_0_does_not_end_the_lock(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        assert run_ranks(lambda: os.getpid(), 2)
        with pytest.raises(OSError, match=f"in use by process {os.getpid()} "):
            RunLock(tmp_path).acquire(wait_s=0.0)


@pytest.mark.parametrize("verb", ["recipe", "distill", "curate", "base", "tokenize", "midtrain", "sft", "rollout_dpo", "rlvr", "controls", "evaluate"])  # fmt: skip
@pytest.mark.parametrize("processes", [1, 2])
def test_every_command_that_writes_is_refused(
    verb: str,
    processes: int,
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(RunLock.acquire, "__defaults__", (0.1,))
    words = [verb, "tiny", f"out={tmp_path}", f"processes={processes}", *(["stage=sft"] if verb == "evaluate" else [])]  # fmt: skip
    with RunLock(tmp_path):
        assert run_ranks(main, 1, words, timeout_s=60) == [1] if processes == 1 else main(words) == 1  # fmt: skip
    assert f"{tmp_path} is in use by process {os.getpid()} on" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]


def test_a_folder_that_is_not_there_is_not_made_by_a_command_that_needs_one(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    assert main(["curate", "tiny", f"out={tmp_path / 'none'}"]) == 2
    assert "distill is not complete" in capfd.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_file_system_without_locks_is_said_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("phimini.stages.run.lock.fcntl.flock", refuse)
    with RunLock(tmp_path):
        assert "nothing keeps a second run out of this folder" in capsys.readouterr().err
