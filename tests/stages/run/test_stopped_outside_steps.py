"""Runs that are stopped outside their step loop, and runs whose output cannot be written."""

import json
import os
import pty
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from forked_ranks import run_ranks

from phimini.stages.cli import main
from phimini.stages.run import training

MICRO = [
    "processes=1", "distill.num_problems=40", "distill.rollouts_per_problem=3", "distill.num_prompts=10",
    "distill.num_heldout=24", "distill.num_validation=24", "midtrain.steps=6", "midtrain.validate_every=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "micro"
    for verb in ("distill", "curate", "base", "tokenize"):
        assert run_ranks(main, 1, [verb, "tiny", f"out={run}", *MICRO]) == [0]
    return run


def metrics(run: Path, stage: str) -> list[dict]:
    return [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("moment", "complete"), [("load_hf", False), ("export_hf", True)])
def test_sigterm_outside_the_step_loop_saves_what_there_is(
    moment: str,
    complete: bool,
    processes: int,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    """Before the loop there is no state. After it the export is finished, as no checkpoint has the last steps."""
    for name in ("distill", "curate", "base", "tokenize"):
        os.symlink(data / name, tmp_path / name)
    words = ["midtrain", "tiny", f"out={tmp_path}", *MICRO]
    action = getattr(training, moment)

    def stop(*args: Any, **options: Any) -> None:
        # Ranks of our own are told by their parent; the one of a single rank is what a scheduler signals.
        if os.environ.get("RANK", "0") == "0":
            os.kill(os.getppid() if processes == 2 else os.getpid(), signal.SIGTERM)
            time.sleep(1.0)
        action(*args, **options)

    monkeypatch.setattr(training, moment, stop)
    words.append(f"processes={processes}")
    if processes == 1:
        assert run_ranks(main, 1, words) == [130]
    else:
        assert main(words) == 130
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert (tmp_path / "midtrain" / "summary.json").exists() == complete
    if complete and processes == 1:
        assert "midtrain is complete; the same command goes on with what follows" in said
    assert not [path for path in tmp_path.rglob("*tmp*") if path.is_file()]
    monkeypatch.undo()
    assert run_ranks(main, 1, [*words[:-1]]) == [0]
    assert len(metrics(tmp_path, "midtrain")) == 6


@pytest.mark.parametrize("output", ["full", "closed pipe", "closed", "ascii terminal"])
def test_output_never_ends_a_run(output: str, data: Path, tmp_path: Path) -> None:
    for name in ("distill", "curate", "base", "tokenize"):
        os.symlink(data / name, tmp_path / name)
    words = ["midtrain", "tiny", f"out={tmp_path}", *MICRO]

    def run() -> int:
        os.close(1)
        if output == "closed":
            sys.stdout = None
            return main(words)
        if output == "full":
            os.open("/dev/full", os.O_WRONLY)
        elif output == "closed pipe":
            read, write = os.pipe()  # read is 1, the lowest that is free
            os.dup2(write, read)
            os.close(write)
        else:
            leader, follower = pty.openpty()
            threading.Thread(target=lambda: [None for _ in iter(lambda: os.read(leader, 4096), b"")], daemon=True).start()  # fmt: skip
            os.dup2(follower, 1)
        sys.stdout = open(1, "w", encoding="ascii", buffering=1)
        os.environ["TERM"] = "xterm"
        return main(words)

    assert run_ranks(run, 1) == [0]
    assert len(metrics(tmp_path, "midtrain")) == 6
    assert (tmp_path / "midtrain" / "summary.json").exists()
