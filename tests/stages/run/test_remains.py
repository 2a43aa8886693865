"""kill -9 between two lines of a command: a rerun leaves the same tree as a run without a kill."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked_ranks import RankFailure, run_ranks

from phimini.model.io import json_files as jsonl
from phimini.model.io import safetensors_folder as tensor_files
from phimini.stages.cli import main
from phimini.stages.rollout.engine_folder import engine_folder
from phimini.stages.run import stage_folder as stage
from phimini.stages.run.progress import PROGRESS
from phimini.stages.run.status import ENDED

MICRO = [
    "processes=1", "distill.num_problems=40", "distill.rollouts_per_problem=3", "distill.num_prompts=10",
    "distill.num_heldout=24", "distill.num_validation=24", "midtrain.steps=3", "midtrain.checkpoint_every=1",
    "midtrain.validate_every=3",
]  # fmt: skip


def tree(out: Path) -> set[str]:
    """Return all paths in a run's folder but those of the present, which each command replaces."""
    return {str(p.relative_to(out)) for p in out.rglob("*") if p.name not in (ENDED, PROGRESS)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    for verb in ("distill", "curate", "base", "tokenize", "midtrain"):
        assert run_ranks(main, 1, [verb, "tiny", f"out={out}", *MICRO]) == [0]
    return out


def killed_after(owner: Any, name: str, when: Callable[..., bool], before: bool = False) -> None:
    action = getattr(owner, name)

    def then_killed(*args: Any, **options: Any) -> Any:
        if before and when(*args):
            os.kill(os.getpid(), signal.SIGKILL)
        result = action(*args, **options)
        if when(*args):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, then_killed)


def is_summary(path: Any, *_: Any) -> bool:
    return str(path).endswith("midtrain/summary.json")


MOMENTS = {
    "after the summary": lambda: killed_after(
        stage, "write_summary", lambda folder, *_: folder.name == "midtrain"
    ),
    "in a JSON file": lambda: killed_after(
        jsonl.os, "replace", lambda _, b: is_summary(b), before=True
    ),  # fmt: skip
    "in the export": lambda: killed_after(
        tensor_files, "_write_shard", lambda path, _: "/midtrain/" in str(path)
    ),  # fmt: skip
    "in the tokenizer": lambda: killed_after(
        jsonl.os, "replace", lambda _, b: b.name == "tokenizer.json", before=True
    ),  # fmt: skip
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_next_command_removes_what_a_kill_left(
    moment: str, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "midtrain")
    words = ["midtrain", "tiny", f"out={out}", *MICRO]

    def killed() -> int:
        MOMENTS[moment]()
        return main(words)

    with pytest.raises(RankFailure, match="SIGKILL"):
        run_ranks(killed, 1)
    assert tree(out) - tree(finished), "the kill left something"
    assert run_ranks(main, 1, words) == [0]
    assert tree(out) == tree(finished)


def test_a_redo_that_is_killed_leaves_no_half_of_a_complete_stage(
    finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    words = ["midtrain", "tiny", f"out={out}", *MICRO]

    def killed() -> int:
        killed_after(os, "unlink", lambda path, *_: "model.safetensors" in str(path))
        return main([*words, "--redo"])

    with pytest.raises(RankFailure, match="SIGKILL"):
        run_ranks(killed, 1)
    assert not (out / "midtrain").exists()
    assert run_ranks(main, 1, words) == [0]
    assert tree(out) == tree(finished)


def test_files_of_others_and_behind_links_stay(finished: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(finished, out)
    other.mkdir()
    for kept in (other / ".summary.json.1.0123abcd.tmp", out / ".notes.tmp", out / "mine.tmp"):
        kept.write_text("")
    os.symlink(other, out / "linked")
    before = tree(out) | tree(other)
    assert run_ranks(main, 1, ["midtrain", "tiny", f"out={out}", *MICRO]) == [0]
    assert tree(out) | tree(other) == before


def test_an_engine_s_folder_is_removed_once_its_process_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = "import sys, time\nfrom phimini.stages.rollout.engine_folder import engine_folder\nwith engine_folder() as f:\n print(f, flush=True)\n time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, text=True,
                               env=os.environ | {"TMPDIR": str(tmp_path)})  # fmt: skip
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    (folder / "socket").write_text("")
    with engine_folder() as own:
        assert folder.exists() and own.exists()
    assert not own.exists()
    process.kill()
    process.wait()
    assert folder.exists()
    with engine_folder():
        assert not folder.exists()
    assert not list(tmp_path.iterdir())
