"""What the command line says of itself, and of words that it does not know."""

import pytest

from phimini.bench.cli import benches, main
from phimini.stages.cli import VERBS


def test_help_names_every_verb_on_one_screen(capsys: pytest.CaptureFixture) -> None:
    assert main(["--help"]) == 0
    page = capsys.readouterr().out
    assert all(verb in page for verb in (*VERBS, "bench"))
    lines = page.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 120


def test_every_bench_is_found_and_named(capsys: pytest.CaptureFixture) -> None:
    """By its docstring: a new file needs no entry anywhere."""
    known = benches()
    assert {"kernels", "train", "rollout", "weight-sync", "compare", "bless"} <= known.keys()
    assert main(["bench"]) == 0
    page = capsys.readouterr().out
    for name, (_, usage) in known.items():
        call, what = usage.split("\n")
        assert call.startswith(f"phimini bench {name}") and call in page and len(what.strip()) > 10


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
