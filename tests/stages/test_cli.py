"""What the command line says of itself, and of words that it does not know."""

import importlib.util
import sys
from pathlib import Path

import pytest

from phimini.bench.cli import BENCHES
from phimini.parallel.ranks.local_launch import run_ranks
from phimini.stages.cli import VERBS, main


def test_help_names_every_verb_on_one_screen(capsys: pytest.CaptureFixture) -> None:
    assert main(["--help"]) == 0
    page = capsys.readouterr().out
    assert all(verb in page for verb in (*VERBS, "bench"))
    lines = page.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 120


def test_every_bench_is_listed_and_its_module_exists(capsys: pytest.CaptureFixture) -> None:
    assert main(["bench"]) == 0
    page = capsys.readouterr().out
    for name, bench in BENCHES.items():
        assert f"phimini bench {name} {bench.usage}\n    {bench.summary}\n" in page
        assert importlib.util.find_spec(f"phimini.bench.{bench.module}") is not None, name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipee", "tiny"], "unknown command 'recipee'; did you mean recipe? expected one of"),
        (["mid-train", "tiny"], "did you mean midtrain?"),
        (["bench", "weightsync"], "unknown bench 'weightsync'; did you mean weight-sync?"),
        (["bench", "xyz"], "unknown bench 'xyz'; expected one of"),
        (["recipe", "phi4_mini_resoning"], "did you mean phi4_mini_reasoning?"),
        (["recipe", "tiny", "midtran.steps=1"], "did you mean midtrain.steps"),
        (["recipe", "tiny", "--dryrun"], "did you mean --dry-run?"),
        (["sft", "tiny", "--dry-run"], "sft: unknown option --dry-run; expected one of --redo"),
        (["plan", "tiny", "gpu=h10"], "did you mean h100?"),
        (["plan", "tiny", "stage=stf"], "did you mean sft?"),
        (["doctor", "--mismach"], "did you mean --mismatch?"),
        (["doctor", "--dist", "tensr=2"], "did you mean tensor?"),
        (["launch", "slrum"], "did you mean slurm?"),
        (["launch", "slurm", "node=2", "--", "recipe", "tiny"], "did you mean nodes?"),
        (["evaluate", "tiny", "stage=stf"], "did you mean sft?"),
        (["report", "tiny", "--json", "x"], "unknown option --json"),
    ],
    ids=" ".join,
)
def test_an_unknown_word_names_the_nearest_one(
    words: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("data --rounds 0", 2, "bench data: --rounds: expected at least 1, got 0"),
        ("rollout --rounds=0", 2, "bench rollout: --rounds: expected at least 1, got 0"),
        ("train sft --steps -3", 2, "bench train: --steps: expected at least 1, got -3"),
        ("weight-sync --repeats 0", 2, "bench weight-sync: --repeats: expected at least 1, got 0"),
        ("kernels rope --json {}/file/x.json", 1, "/file"),
        ("kernels rope --json {}", 2, "expected a file that can be written"),
        ("readme {}/none", 2, "/none: no results.json"),
        ("kernels --statc", 2, "bench kernels: unrecognized arguments: --statc"),
        ("kernels ropee --static", 2, "bench kernels: unknown op 'ropee'"),
        ("golden --layouts 3", 2, "bench golden: unknown layout '3'"),
    ],
)
def test_a_bench_refuses_before_it_measures(
    words: str, status: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["bench", *words.replace("{}", str(tmp_path)).split()]) == status
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("report tiny out={}/none", 1, "/none/results.json"),
        ("distill tiny out={}/file", 1, "/file"),
        ("distill tiny distill.source={}/empty out={}/run", 1, "/empty/rollouts.jsonl"),
        ("distill tiny distill.gym_tasks=gcd out={}/run", 2, "reasoning-gym is not installed"),
        ("evaluate tiny processes=1 stage=sft out={}/none", 2, "/none/sft is not complete"),
    ],
)
def test_what_is_not_there_is_named_in_one_line(
    words: str,
    status: int,
    message: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    command = words.replace("{}", str(tmp_path)).split()
    assert run_ranks(main, 1, command) == [status]  # forked: an evaluation joins a job
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1
