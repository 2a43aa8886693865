"""A run seen from outside: lines of progress from every long step, `watch`, and the report of a run in any state."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forked_ranks import run_ranks
from recipe_cases import MICRO, command
from rl_run import make_run, reinforce, run_config

from phimini.model.io.json_files import read_json
from phimini.stages.cli import main
from phimini.stages.run import progress, status
from phimini.stages.run.lock import RunLock
from phimini.stages.run.progress import PROGRESS, work
from phimini.stages.run.status import ENDED, read_status, recorded

VERBS = ("distill", "curate", "base", "tokenize", "midtrain", "sft", "rollout_dpo")


def eager(words: list[str]) -> int:
    """Run a command in which any work counts as long."""
    progress.QUIET_S = 1e-9
    return main(words)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("watch") / "micro"


@pytest.fixture(scope="module")
def said(run: Path) -> dict[str, str]:
    """Run each verb of a micro run; return the printed text by verb."""
    found = {}
    for name in (*VERBS, "evaluate"):
        words = [name, "tiny", f"out={run}", *MICRO, *(["stage=sft"] if name == "evaluate" else [])]
        output = run.with_suffix(f".{name}")
        status, _ = run_ranks(printed, 1, words, output)[0]
        assert status == 0, output.read_text()
        found[name] = output.read_text()
    return found


def printed(words: list[str], output: Path) -> tuple[int, None]:
    with output.open("w") as sys.stdout:
        return eager(words), None


LINES = {
    "distill": r"distill 1/104  .*left",
    "curate": r"curate index 1/240  .*left",
    "tokenize": r"tokenize [1-9]\d*/242  \d+ s left",
    "midtrain": r"midtrain 1/6  .*left",
    "rollout_dpo": r"rollout_dpo reference log-probs 1/\d+  .*left",
    "evaluate": r"evaluate sft 1/216  .*left",
}


@pytest.mark.parametrize("verb", LINES)
def test_a_long_step_shows_the_share_done_and_the_time_left(
    verb: str, said: dict[str, str]
) -> None:
    assert re.search(rf"^{LINES[verb]}$", said[verb], re.MULTILINE), said[verb]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_probe_shows_the_answers_of_rank_0s_share(
    ranks: int, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    def rank(config: Any) -> int:
        progress.QUIET_S = 1e-9
        return len(reinforce(config))

    assert run_ranks(rank, ranks, run_config(make_run(tmp_path / "run")), timeout_s=200)[0] == 3
    total = 32 // ranks
    lines = capfd.readouterr().out
    assert re.search(rf"^rlvr probe 1/{total}  .*left$", lines, re.MULTILINE), lines
    assert re.search(rf"^rlvr probe {total}/{total}$", lines, re.MULTILINE), lines


@pytest.mark.parametrize("workers", [1, 2])
def test_tokenizing_counts_rows_not_shards(
    workers: int, run: Path, said: dict, tmp_path: Path
) -> None:
    from phimini.model.io.tokenizer import Tokenizer
    from phimini.stages.data import token_files

    rows = run / "curate" / "midtrain.jsonl"
    seen: list[int] = []
    token_files.SHARD_BYTES, kept = rows.stat().st_size // 2, token_files.SHARD_BYTES
    try:
        shards = token_files.shards_of(rows, tmp_path)
    finally:
        token_files.SHARD_BYTES = kept
    tokenizer = Tokenizer.load(run / "base" / "model")
    made = list(token_files.write_shards(shards, tokenizer, "instruct", workers, seen.append))
    assert len(made) == len(shards) >= 2
    assert seen[-1] == rows.read_bytes().count(b"\n") and seen == sorted(seen)


def test_a_source_of_rows_is_counted_in_its_files(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """A file is read twice, for its questions and for its rows."""
    rows = [
        {"question": f"What is {n} times 7?", "answer": str(7 * n), "response": f"\\boxed{{{7 * n}}}"}
        for n in range(100)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    words = ["distill", "tiny", f"out={tmp_path / 'run'}", *MICRO, f"distill.source={tmp_path / 'rows.jsonl'}"]  # fmt: skip
    assert run_ranks(eager, 1, words)[0] == 0
    shown = capfd.readouterr().out
    for what in ("questions", "rows"):
        assert re.search(rf"^distill rows.jsonl {what} 1/100  .*left$", shown, re.MULTILINE), shown


def test_short_work_shows_nothing_and_long_work_from_2_s_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    now = [1000.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    for seconds in (0.1, 1.0):
        with work("curate index", 12, tmp_path) as of_work:
            for _ in range(12):
                now[0] += seconds
                of_work.advance()
    assert capsys.readouterr().out.splitlines() == [
        "curate index 2/12  10 s left", "curate index 7/12  5 s left", "curate index 12/12"
    ]  # fmt: skip
    seen = read_json(tmp_path / PROGRESS)
    assert (seen["label"], seen["done"], seen["left_s"]) == ("curate index", 12, 0)


# --- watch -----------------------------------------------------------------------------------------
def watched(*words: str) -> str:
    """Return what `phimini watch` prints where there is no terminal: once."""
    process = subprocess.run([sys.executable, "-W", "ignore", "-m", "phimini.stages.cli", "watch", *words],
                             capture_output=True, text=True, timeout=100)  # fmt: skip
    assert process.returncode == 0, process.stderr
    return process.stdout


HOLDER = """
import sys
from phimini.stages.run.lock import RunLock
from phimini.stages.run.progress import work
from phimini.stages.run.status import recorded
with RunLock(sys.argv[1]), recorded(sys.argv[1], "sft"):
    from phimini.stages.run import progress
    progress.QUIET_S = 1e-9
    progress.FIRST_STEPS = 0
    of_work = work("sft", 40, sys.argv[1])
    of_work.update(10)
    of_work.update(11)
    of_work.close()
    print("running", flush=True)
    sys.stdin.read()
"""


def holder(run: Path) -> subprocess.Popen:
    """Return a process that uses the run's folder until its standard input is closed."""
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", HOLDER, str(run)],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout is not None
    while process.stdout.readline() != "running\n":
        pass
    return process


@pytest.fixture
def copy(run: Path, said: dict, tmp_path: Path) -> Iterator[Path]:
    """A run of which stage 2 has been begun again."""
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    (folder / "sft" / "summary.json").unlink()
    yield folder


def test_a_running_run_is_watched_without_its_lock(copy: Path) -> None:
    process = holder(copy)
    try:
        shown = watched(str(copy))
        assert (
            f"{copy}: running: sft 11/40 (28 %), " in shown and " s left" in shown.splitlines()[0]
        )
        assert re.search(r"^midtrain +complete, 6 steps, \d+ s +loss \d", shown, re.MULTILINE), (
            shown
        )
        assert re.search(r"^sft +step 11 of 40 ", shown, re.MULTILINE), shown
        assert process.poll() is None
        with pytest.raises(OSError, match="is in use"):  # the watcher took nothing away
            RunLock(copy).acquire(wait_s=0.1)
    finally:
        process.kill()
        process.wait()
    assert "killed in sft: process" in watched(str(copy)).splitlines()[0]


def test_a_terminal_is_refreshed_until_the_command_ends(copy: Path) -> None:
    process = holder(copy)
    reader, writer = pty.openpty()
    watcher = subprocess.Popen([sys.executable, "-W", "ignore", "-m", "phimini.stages.cli", "watch", str(copy)],
                               stdout=writer, stdin=writer, env=os.environ | {"TERM": "xterm", "COLUMNS": "150"})  # fmt: skip
    os.close(writer)
    text = b""
    while True:
        try:
            text += os.read(reader, 1 << 16)
        except OSError:
            break
        if b"running: sft 11/40" in text and process.poll() is None:
            process.communicate(timeout=60)
    assert watcher.wait(timeout=60) == 0
    assert b"running: sft 11/40" in text and b"copy: complete" in text


def test_a_failed_run_is_named_with_its_error(copy: Path) -> None:
    for name in ("base", "midtrain"):
        shutil.copy(copy / "evaluate" / "sft.json", copy / "evaluate" / f"{name}.json")
    with pytest.raises(ValueError), recorded(copy, "recipe"):
        raise ValueError("sft: a row is bad")
    assert watched(str(copy)).splitlines()[0] == f"{copy}: failed in sft: sft: a row is bad"


def test_a_recipe_fails_in_the_evaluation_that_is_missing(copy: Path, run: Path) -> None:
    shutil.copy(run / "sft" / "summary.json", copy / "sft")
    for name in ("base", "midtrain"):
        shutil.copy(run / "evaluate" / "sft.json", copy / "evaluate" / f"{name}.json")
    (copy / "evaluate" / "sft.json").unlink()
    with pytest.raises(KeyboardInterrupt), recorded(copy, "recipe"):
        raise KeyboardInterrupt
    assert read_status(copy).line == "stopped in evaluate sft: KeyboardInterrupt"


def test_an_empty_and_a_missing_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert watched(str(tmp_path)).splitlines()[0] == f"{tmp_path}: empty: no stage of a run is here"
    assert main(["watch", str(tmp_path / "none")]) == 2
    assert (
        f"{tmp_path}/none: expected the folder of a run, got nothing there"
        in capsys.readouterr().err
    )
    assert watched("tiny", f"out={tmp_path}").startswith(f"{tmp_path}: empty"), "also by its recipe"


def test_alarms_of_guards_are_shown(copy: Path) -> None:
    with (copy / "midtrain" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 9.5, "alarm_loss_spike": 70.0}\n{"step": 7, "lo')
    shown = watched(str(copy))
    assert "alarm: midtrain: loss_spike in 1 steps, last in step 7" in shown, shown


def test_a_complete_command_is_recorded(run: Path, said: dict) -> None:
    assert (
        read_json(run / ENDED)["end"] == "complete" and read_json(run / ENDED)["verb"] == "evaluate"
    )
    assert read_status(run).state == "complete"


# --- the report of a run that is not complete ------------------------------------------------------
def test_the_report_of_a_failed_recipe_names_what_failed(copy: Path, run: Path, capfd: Any) -> None:
    """Stage 4 finds no usable prompt: the page has the stages before it, and why there is no more."""
    shutil.copy(run / "sft" / "summary.json", copy / "sft")
    assert command(["recipe", "tiny", f"out={copy}", *MICRO]) == 2
    assert command(["report", str(copy)]) == 0
    page = (copy / "report.html").read_text()
    assert "in three stages" in page
    assert re.search("failed in rlvr: rlvr: of 8 probed prompts none is answered right in 32 answers", page)  # fmt: skip
    assert "failed in rlvr" in capfd.readouterr().out


def test_the_report_of_a_running_stage_has_its_curves(copy: Path) -> None:
    process = holder(copy)
    try:
        assert command(["report", str(copy)]) == 0
    finally:
        process.kill()
        process.wait()
    page = (copy / "report.html").read_text()
    assert "No results yet" in page and "running: sft 11/40" in page
    assert "<h3>Mid-training</h3>" in page and "<h3>SFT</h3>" in page


def test_the_report_of_a_run_with_data_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError), recorded(tmp_path, "distill"):
        raise ValueError("distill.source: rows.jsonl, line 3: bad")
    assert command(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "failed in distill: distill.source: rows.jsonl, line 3: bad" in page


def test_the_kernel_knows_who_holds_a_lock(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    holds = lambda: status.is_held(tmp_path / ".lock", (tmp_path / ".lock").read_text())
    with lock:
        assert holds()
    assert not holds()
