"""Random values of every field: a config and its dry run either come about or the field is named."""

import contextlib
import io
import random
from pathlib import Path

import pytest
from fuzz import fuzz

from phimini.stages.config.dialect import paths
from phimini.stages.config.recipes import RECIPES, recipe_config
from phimini.stages.config.schema import RunConfig, override
from phimini.stages.dry_run import cost_table, examine
from phimini.stages.run.stage_folder import settings

PATHS = [path for path, _ in paths(RunConfig)]
VALUES = [
    "", " ", "none", "None", "true", "false", "0", "-0", "1", "2", "3", "4", "5", "7", "8", "16", "64", "-1", "1e9", "1e18", "1e300",
    "1e301", "1e400", "-1e400", "nan", "inf", "-inf", "NaN", "9" * 20, "9" * 400, "9" * 5000, "1_000", "0x10", "１２", "٣", "1,2", "1,,2",
    ",", "a", "é", "\u202e", "😀", "\x00", "a\x00b", "../x", "/", "/dev/null", "/dev/null/x", "/proc/1/x", "~", "x" * 5000, "0.5", "1.5",
    "0.999999999999", "1e-320", "5e-324", "generator", "random", "tiny", "phi-4-mini", "phi-400m", "local", "vllm", "separate", "colocated",
    "shm", "gloo", "te", "emulate", "full", "127.0.0.1:1", "h:99999", ":", "::1", "[::1]:80", "1000000", "2147483648", "4294967296",
    "18446744073709551616", "cosine", "saturation", "teacher", "ring", "{}", "[]", "null", "'", '"', "<script>", "$(x)", "`x`", "\n", "1\n",
    "\t1", "1 ", "+1", "--1", "\ud800",
]  # fmt: skip
WORDS = ["x", "=", "a=b", "rlvr=1", "rlvr.optimizer=2", "rlvr.steps.x=1", ".=1", "rlvr..steps=1", "__class__=1", "seed.real=1"]  # fmt: skip


def given(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.75:
        return rng.choice(VALUES)
    if kind < 0.85:
        size = 10 ** rng.randint(0, 30)
        return str(rng.randint(-size, size))
    if kind < 0.93:
        return repr(rng.uniform(-1, 1) * 10.0 ** rng.randint(-300, 300))
    return "".join(chr(rng.randrange(1, 0x3000)) for _ in range(rng.randint(0, 20)))


def words_of(rng: random.Random) -> list[str]:
    words = [f"{rng.choice(PATHS)}={given(rng)}" for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    if rng.random() < 0.02:
        words.append(rng.choice(WORDS))
    return words


def examined(rng: random.Random, words: list[str]) -> str:
    run = override(recipe_config(rng.choice(["tiny", *RECIPES])), words)
    gpus, gpu = rng.choice([1, 2, 8, 64]), rng.choice([None, None, "h100"])
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        problems, costs = examine(run, gpus, gpu)
        if costs:
            cost_table(costs, gpus)
    settings(run, "rlvr")
    return "not ready" if problems else "ready"


@pytest.mark.parametrize(
    "number", [300, pytest.param(20_000, marks=pytest.mark.faults)], ids="{:,} overrides".format
)
def test_random_overrides(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = 0

    def case(rng: random.Random) -> str:
        nonlocal overrides
        words = words_of(rng)
        overrides += len(words)
        return examined(rng, words)

    counts = fuzz("overrides", 5 * number // 8, case)
    print(f"{overrides:,} overrides")
    assert overrides >= number * 0.9 and counts["ready"] and counts["ValueError"]
    assert not list(tmp_path.iterdir()), "examined only"
