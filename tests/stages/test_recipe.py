"""The whole pipeline at a size that takes seconds: real stages, files and resumes, without learning."""

import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from forked_ranks import run_ranks
from recipe_cases import MICRO, command, finished  # noqa: F401

from phimini.model.io.checked_files import read_sealed
from phimini.model.io.json_files import read_json
from phimini.parallel.ranks.world import World
from phimini.stages.cli import main
from phimini.stages.run import training
from phimini.stages.run.outputs import write_summary
from phimini.stages.run.stage_folder import Interrupt


def metrics(run: Path, stage: str) -> list[dict]:
    return [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]


def test_each_stage_leaves_a_model_a_summary_and_a_row_per_step(finished: Path) -> None:
    for stage in ("midtrain", "sft", "rollout_dpo"):
        summary = read_json(finished / stage / "summary.json")
        rows = metrics(finished, stage)
        assert [row["step"] for row in rows] == list(range(summary["steps"]))
        assert all(math.isfinite(row["loss"]) for row in rows)
        assert summary["tokens"] == sum(row["tokens"] for row in rows) > 0
        assert (finished / stage / "model" / "config.json").exists()
        assert not (finished / stage / "checkpoints").exists()
    assert "validation_loss" in metrics(finished, "midtrain")[-1]


def test_each_stages_model_is_described_like_the_base(finished: Path) -> None:
    """The folder also has the stop ids, without which transformers and `vllm serve` would sample to the limit."""
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        base = read_json(finished / "base" / "model" / name)
        for stage in ("midtrain", "sft", "rollout_dpo"):
            assert read_json(finished / stage / "model" / name) == base, (stage, name)
    assert (
        len(read_json(finished / "sft" / "model" / "generation_config.json")["eos_token_id"]) == 2
    )


def test_the_loss_falls(finished: Path) -> None:
    rows = metrics(finished, "midtrain") + metrics(finished, "sft")
    assert rows[-1]["loss"] < rows[0]["loss"] - 1


def test_the_preference_loss_starts_at_ln_2(finished: Path) -> None:
    """ln 2 up to rounding, because the reference's log-probs were computed in other micro-batches."""
    assert metrics(finished, "rollout_dpo")[0]["preference_loss"] == pytest.approx(
        math.log(2), abs=1e-5
    )


def test_stage_4_says_when_there_is_nothing_to_learn_from(
    finished: Path, capfd: pytest.CaptureFixture
) -> None:
    assert command(["rlvr", "tiny", f"out={finished}", *MICRO]) == 2
    assert "of 8 probed prompts none is answered right in 32 answers" in capfd.readouterr().err


def test_a_recipe_that_ends_in_a_stage_leaves_the_results_before_it(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert command(["recipe", "tiny", f"out={run}", *MICRO]) == 2
    assert "the stage-3 model is too weak for them" in capfd.readouterr().err
    results = read_json(run / "results.json")
    assert [row["stage"] for row in results["stages"]] == ["base", "midtrain", "sft", "rollout_dpo"]
    page = (run / "report.html").read_text()
    assert "in three stages" in page and "Rollout DPO" in page
    # The same command again does not write shorter results on its way to the same stage.
    assert command(["recipe", "tiny", f"out={run}", *MICRO]) == 2
    assert read_json(run / "results.json")["model_ids"] == results["model_ids"]


def test_a_complete_stage_returns_at_once(finished: Path) -> None:
    before = read_json(finished / "midtrain" / "summary.json")["id"]
    assert command(["midtrain", "tiny", f"out={finished}", *MICRO]) == 0
    assert read_json(finished / "midtrain" / "summary.json")["id"] == before


def test_evaluation_is_of_the_model_it_names(finished: Path) -> None:
    assert command(["evaluate", "tiny", "stage=sft", f"out={finished}", *MICRO]) == 0
    result = read_json(finished / "evaluate" / "sft.json")
    assert result["model_id"] == read_json(finished / "sft" / "summary.json")["id"]
    assert result["num_problems"] == 24 and len(result["per_problem_mean"]) == 24
    again = ["evaluate", "tiny", "stage=sft", f"out={finished}", *MICRO]
    assert command(again) == 0
    assert read_json(finished / "evaluate" / "sft.json") == result, "the same: nothing is done"
    assert command([*again, "evaluate.samples=9"]) == 0
    assert read_json(finished / "evaluate" / "sft.json")["num_samples"] == 9, "other settings"


def run_command(*words: str, **kwargs) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "phimini.stages.cli", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs,
    )  # fmt: skip


def wait_for_steps(process: subprocess.Popen, run: Path, steps: int) -> None:
    """Return once metrics.jsonl has a row of so many steps of mid-training."""
    path = run / "midtrain" / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < steps:
        assert process.poll() is None, f"ended before step {steps}"
        time.sleep(0.01)


def test_an_interrupted_stage_goes_on_where_it_stopped(finished: Path, tmp_path: Path) -> None:
    """SIGINT in the middle, then the same command: the same losses as an uninterrupted run."""
    run = tmp_path / "interrupted"
    run.mkdir()
    for name in ("distill", "curate", "base", "tokenize"):
        os.symlink(finished / name, run / name)
    words = ["midtrain", "tiny", f"out={run}", *MICRO]
    process = run_command(*words)
    assert process.stdout is not None
    wait_for_steps(process, run, 2)
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait() == 130, rest
    assert re.search(
        r"stopped after step [2-5] and saved; the same command goes on from there", rest
    ), rest
    assert not (run / "midtrain" / "summary.json").exists()
    stopped_at = len(metrics(run, "midtrain"))
    assert 2 <= stopped_at < 6
    assert command(words) == 0
    got, want = metrics(run, "midtrain"), metrics(finished, "midtrain")
    assert [row["step"] for row in got] == list(range(6))
    assert [row["loss"] for row in got] == pytest.approx([row["loss"] for row in want], abs=1e-5)
    assert got[-1]["validation_loss"] == pytest.approx(want[-1]["validation_loss"], abs=1e-5)


def stopped_at_step(words: list[str], step: int) -> int:
    """Run `phimini WORDS` and ask it to stop after `step` steps."""

    def stop() -> int:
        asked: list[int] = []

        def requested(self: Interrupt, world: World) -> bool:
            asked.append(1)
            return len(asked) == step

        Interrupt.requested = requested
        return main(words)

    return run_ranks(stop, 1)[0]


@pytest.mark.parametrize("change", ["seed=5", "midtrain.rows_per_step=8", "fp8=emulate", "curate"])
def test_an_interrupted_stage_does_not_go_on_as_another(
    change: str, finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """A stage must not continue with another seed; its summary would name only the second seed."""
    run = tmp_path / "run"
    for name in ("distill", "curate", "base", "tokenize"):
        shutil.copytree(finished / name, run / name)
    words = ["midtrain", "tiny", f"out={run}", *MICRO]
    assert stopped_at_step(words, 3) == 130
    if change == "curate":
        assert command(["curate", *words[1:], "--redo"]) == 0
        assert command(words) == 2
        assert "tokenize: curate was made again since; use --redo" in capfd.readouterr().err
    else:
        assert command([*words, change]) == 2
        assert f"midtrain was made with {change.split('=')[0]}=" in capfd.readouterr().err
        # What changes nothing but the cost may change.
        assert command([*words, "midtrain.micro_rows=1", "midtrain.checkpoint_every=2"]) == 0
        assert [row["step"] for row in metrics(run, "midtrain")] == list(range(6))
        assert command(words) == 0


LOST = {
    "metrics.jsonl": r"metrics\.jsonl: has .* in 1 rows, expected .* in 2 rows: the file is damaged",
    "checkpoints/latest.json": r"latest\.json is missing, but the folder holds steps \[2\]",
    "begun.json": r"midtrain/summary\.json: this file is missing beside metrics\.jsonl",
}


@pytest.mark.parametrize("name", LOST)
def test_an_interrupted_stage_does_not_go_on_without_its_files(
    name: str, finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    for stage in ("distill", "curate", "base", "tokenize"):
        os.symlink(finished / stage, tmp_path / stage)
    words = ["midtrain", "tiny", f"out={tmp_path}", *MICRO]
    assert stopped_at_step(words, 2) == 130
    path = tmp_path / "midtrain" / name
    content = path.read_bytes()
    path.unlink()
    if name == "metrics.jsonl":
        path.write_bytes(content.splitlines(True)[0])
    assert command(words) == 2
    said = capfd.readouterr().err
    assert re.search(LOST[name], said) and "--redo" not in said, said
    path.write_bytes(content)
    assert command(words) == 0
    assert [row["step"] for row in metrics(tmp_path, "midtrain")] == list(range(6))


def test_a_stage_that_failed_before_it_made_anything_may_begin_otherwise(
    finished: Path, tmp_path: Path
) -> None:
    for name in ("distill", "curate", "base", "tokenize"):
        os.symlink(finished / name, tmp_path / name)
    words = ["midtrain", "tiny", f"out={tmp_path}", *MICRO]
    assert command([*words, "midtrain.sequence_length=20"]) == 2
    assert command(words) == 0
    assert read_json(tmp_path / "midtrain/summary.json")["settings"]["midtrain"]["sequence_length"] == 256  # fmt: skip


def test_sigterm_to_torchrun_saves_and_says_how_to_go_on(finished: Path, tmp_path: Path) -> None:
    """Like a preemption under the launch scripts: torchrun forwards the signal and waits for the ranks."""
    run = tmp_path / "preempted"
    run.mkdir()
    for name in ("distill", "curate", "base", "tokenize"):
        os.symlink(finished / name, run / name)
    words = ["midtrain", "tiny", f"out={run}", *MICRO, "midtrain.steps=400"]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
         "--shutdown-timeout", "120", "-m", "phimini.stages.cli", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    wait_for_steps(process, run, 2)
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    assert process.wait(timeout=300) != 0, rest
    stopped = re.search(r"stopped after step (\d+) and saved; the same command goes on", rest)
    assert stopped, rest
    saved = read_json(run / "midtrain" / "checkpoints" / "latest.json")
    assert saved["step"] == int(stopped.group(1)) < 400
    assert not (run / "midtrain" / "summary.json").exists()


def test_a_rank_killed_in_a_step_under_torchrun_ends_the_others_and_is_named(
    finished: Path, tmp_path: Path
) -> None:
    """kill -9 during a step; then the same command resumes from the last checkpoint."""
    run = tmp_path / "killed"
    run.mkdir()
    for name in ("distill", "curate", "base", "tokenize"):
        os.symlink(finished / name, run / name)
    words = ["midtrain", "tiny", f"out={run}", "tensor_parallel=2", *MICRO, "midtrain.steps=60",
             "midtrain.checkpoint_every=2", "midtrain.validate_every=60"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
         "-m", "phimini.stages.cli", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    wait_for_steps(process, run, 7)
    ranks = {p.environ()["RANK"]: p for p in psutil.Process(process.pid).children()}
    ranks["1"].kill()
    began = time.monotonic()
    rest = process.stdout.read()
    assert process.wait(timeout=120) == 1, rest
    assert time.monotonic() - began < 60
    assert "phimini: rank 1 of 2 gave no sign of life" in rest, rest
    assert re.search(r"exitcode: -9\) local_rank: 1", rest), "torchrun's own words"
    saved = read_json(run / "midtrain" / "checkpoints" / "latest.json")["step"]
    assert saved >= 2 and not (run / "midtrain" / "summary.json").exists()
    assert command([w for w in words if not w.startswith("tensor")]) == 0  # on one rank
    assert [row["step"] for row in metrics(run, "midtrain")] == list(range(60))


def test_a_rank_that_hangs_is_named_within_the_run_s_deadline(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    for name in ("distill", "curate", "base", "tokenize"):
        os.symlink(finished / name, tmp_path / name)
    load = training.load_hf

    def load_or_hang(*args: Any) -> None:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGSTOP)
        load(*args)

    monkeypatch.setattr(training, "load_hf", load_or_hang)
    words = ["midtrain", "tiny", f"out={tmp_path}", *MICRO, "processes=2"]
    began = time.monotonic()
    assert main([*words, "collective_deadline_s=2"]) == 1
    assert time.monotonic() - began < 60
    assert "phimini: rank 1 of 2 gave no sign of life" in capfd.readouterr().err


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_ends_with_one_clear_line(
    processes: int, finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """A limit on the size of a file simulates the full disk."""
    for name in ("distill", "curate", "base", "tokenize"):
        os.symlink(finished / name, tmp_path / name)
    words = ["midtrain", "tiny", f"out={tmp_path}", *MICRO, "midtrain.checkpoint_every=2"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_200_000, before[1]))
    try:
        status = command(words) if processes == 1 else main([*words, "processes=2"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capfd.readouterr().err
    assert status == 1 and "Traceback" not in error, error
    assert re.search(
        r"phimini: .*step-00000002.tmp/\S+distcp: cannot be written, \d+ bytes are free", error
    ), error


def test_tensor_parallel_under_torchrun_gives_the_same_first_losses(
    finished: Path, tmp_path: Path
) -> None:
    for stage, inputs in {
        "midtrain": ("distill", "curate", "base", "tokenize"),
        "sft": ("distill", "curate", "base", "tokenize", "midtrain"),
        "rollout_dpo": ("distill", "curate", "base", "tokenize", "midtrain", "sft"),
    }.items():
        run = tmp_path / stage
        run.mkdir()
        for name in inputs:
            os.symlink(finished / name, run / name)
        process = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
             "-m", "phimini.stages.cli", stage, "tiny", f"out={run}", "tensor_parallel=2", *MICRO],
            capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=900,
        )  # fmt: skip
        assert process.returncode == 0, process.stderr[-3000:]
        assert metrics(run, stage)[0]["loss"] == pytest.approx(
            metrics(finished, stage)[0]["loss"], abs=1e-5
        )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipee", "tiny"], "unknown command 'recipee'"),
        (["recipe"], "recipe: name a recipe"),
        (["recipe", "tinny"], "unknown recipe 'tinny'"),
        (["recipe", "tiny", "--force"], "unknown '--force'"),
        (["recipe", "tiny", "sed=1"], "unknown 'sed=1'; did you mean seed?"),
        (
            ["recipe", "tiny", "collective_deadline_s=0"],
            "collective_deadline_s: expected a number from 1 to 1000000, got 0.0",
        ),
        (["evaluate", "tiny"], "evaluate: expected stage=NAME"),
        (
            ["midtrain", "tiny", "processes=1", "tensor_parallel=3"],
            "world size 1 is not a multiple of tensor 3",
        ),
        (["midtrain", "tiny", "processes=1", "model=huge"], "unknown model preset 'huge'"),
    ],
)
def test_bad_commands_end_with_one_clear_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert (
        main(
            [*words[:2], f"out={tmp_path}", *words[2:]]
            if len(words) > 1 and words[0] in ("midtrain",)
            else words
        )
        == 2
    )
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_document_longer_than_the_sequence_is_named(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    run = tmp_path / "short"
    run.mkdir()
    for name in ("distill", "curate", "base", "tokenize"):
        os.symlink(finished / name, run / name)
    assert command(["midtrain", "tiny", f"out={run}", *MICRO, "midtrain.sequence_length=20"]) == 2
    assert re.search(
        r"midtrain.jsonl:\d+: \d+ tokens, but midtrain.sequence_length is 20",
        capfd.readouterr().err,
    )


def test_malformed_training_rows_name_file_and_line(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    run = tmp_path / "broken"
    (run / "curate").mkdir(parents=True)
    for name in ("distill", "base"):
        os.symlink(finished / name, run / name)
    for file in (finished / "curate").iterdir():
        (run / "curate" / file.name).write_bytes(file.read_bytes())
    with (run / "curate" / "midtrain.jsonl").open("a") as file:
        file.write('{"question": "unfinished\n')
    summary = read_sealed(run / "curate" / "summary.json")
    write_summary(run / "curate", {k: v for k, v in summary.items() if k != "files"})
    assert command(["tokenize", "tiny", f"out={run}", *MICRO]) == 2
    assert re.search(r"midtrain.jsonl.*line \d+", capfd.readouterr().err)
