"""Help of the command line, and errors for unknown words."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from forked_ranks import run_ranks

from phimini.bench.cli import BENCHES
from phimini.stages.cli import VERBS, function_of, main


def test_help_names_every_verb_on_one_screen(capsys: pytest.CaptureFixture) -> None:
    assert main(["--help"]) == 0
    page = capsys.readouterr().out
    assert all(verb in page for verb in VERBS)
    lines = page.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 120


def test_every_verb_has_a_function_and_help(capsys: pytest.CaptureFixture) -> None:
    for name, verb in VERBS.items():
        assert callable(function_of(verb.function)), name
        assert main([*name.split(), "--help"]) == 0, name
        assert f"phimini {name}" in capsys.readouterr().out
    for name in ("launch", "doctor"):
        assert main([name, "--help"]) == 0
        assert capsys.readouterr().out.count(f"{name} ") >= 2


@pytest.mark.parametrize(
    ("words", "status"),
    [("--help", 0), ("recipe --help", 0), ("bench --help", 0), ("bench", 0), ("config tiny", 0), ("doctor --help", 0), ("recipee tiny", 2),
     ("sft tiny sede=1", 2), ("sft tiny seed=one", 2), ("evaluate tinny", 2), ("launch slrum", 2)],
)  # fmt: skip
def test_help_and_bad_words_do_not_wait_for_torch(words: str, status: int) -> None:
    """It takes a tenth of a CPU second; torch and megatron-core would make it five."""
    code = (
        "import resource, sys; from phimini.stages.cli import main\n"
        f"status = main({words.split()})\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "assert not {'torch', 'megatron', 'numpy'} & sys.modules.keys(), 'imported'\n"
        "assert used.ru_utime + used.ru_stime < 1, used\n"
        "sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr


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
        (["sft", "tiny", "--dry-run"], "sft: unknown '--dry-run'; --help names every field"),
        (["sft", "tiny", "--red"], "did you mean --redo?"),
        (["recipe", "tiny", "gpus=8"], "recipe: gpus=8 goes with --dry-run"),
        (["recipe", "seed=1"], "recipe: name a recipe, e.g. `phimini recipe tiny`"),
        (["recipe", "tiny", "sft"], "recipe: expected key=value, got 'sft'"),
        (["plan", "tiny", "gpu=h10"], "did you mean h100?"),
        (["plan", "tiny", "stage=stf"], "did you mean sft?"),
        (["doctor", "tiny", "--paritty"], "did you mean --parity?"),
        (["doctor", "--dist", "tensr=2"], "did you mean tensor?"),
        (["doctor"], "doctor: name a recipe, e.g. `phimini doctor tiny`"),
        (["evaluate", "tiny"], "evaluate: expected stage=NAME, one of base, midtrain"),
        (["launch", "slrum"], "did you mean slurm?"),
        (["launch", "slurm", "node=2", "--", "recipe", "tiny"], "did you mean nodes?"),
        (["evaluate", "tiny", "stage=stf"], "did you mean sft?"),
        (["report", "tiny", "--json", "x"], "report: unknown '--json'"),
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
        ("report tiny out={}/none", 2, "/none: expected the folder of a run, got nothing there"),
        ("distill tiny out={}/file", 1, "/file"),
        (
            "distill tiny distill.source={}/empty out={}/run",
            2,
            "/empty: expected files named *.jsonl",
        ),
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
