"""What FP8 costs is the committed rows, the README shows them, and they keep the promise of one per cent."""

import statistics
from pathlib import Path
from typing import Any

import pytest
from fp8_cases import CONFIG

from phimini.bench.studies import fp8
from phimini.model.io.json_files import read_rows
from phimini.parallel.megatron.builder import build_model
from phimini.parallel.megatron.layers import ColumnParallelLinear
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.local_launch import run_ranks
from phimini.parallel.ranks.world import initialize
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import override

README = (Path(__file__).parents[3] / "README.md").read_text()
ROWS = read_rows(fp8.ROWS, fp8.FIELDS)


def test_the_readme_shows_the_committed_rows() -> None:
    assert fp8.table(ROWS) in README, "README: run `phimini bench fp8` and paste what it prints"


def test_fp8_costs_less_than_one_percent_of_the_loss() -> None:
    """On the same weights and from the same state with its whole interval; of whole runs, which part by chaos, the mean."""
    found = fp8.differences(ROWS)
    whole, part = tiny().midtrain.steps, 800
    assert whole is not None
    assert f"{part} of its {whole:,} steps" in README, "how much of the stage it was"
    for arm in ("tensorwise", "blockwise"):
        for steps in (part, whole):
            assert len(found[steps, arm]["training"]) >= 4
            assert statistics.fmean(found[steps, arm]["training"]) < 0.01
            for question in ("forward", "forward, trained in FP8"):
                _, low, high = fp8.interval(found[steps, arm][question])
                assert -0.01 < low < high < 0.01
        _, low, high = fp8.interval(found[whole, arm]["20 steps"])
        assert -0.01 < low < high < 0.01
        # What is left may be chaos: a change of that size moves runs in fp32 as far.
        _, low, high = fp8.interval(found[part, arm]["training"])
        _, floor_low, floor_high = fp8.interval(found[part, "fp32 nudged"]["training"])
        assert low < floor_high and floor_low < high


def test_an_interval_is_students() -> None:
    assert fp8.interval([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2.5, 0.4457, 4.5543), abs=1e-3)
    with pytest.raises(ValueError, match="expected 2 to 8 seeds, got 1"):
        fp8.interval([1.0])


def linears() -> dict[str, list[str]]:
    world = initialize(Layout(), CONFIG)
    model = build_model(CONFIG, world, seed=3)
    layers: Any = model.gpts[0].decoder.layers
    names = lambda: [type(layer.mlp.linear_fc1).__name__ for layer in layers]
    seen = {"before": names()}
    for mode in ("mxfp8", "fp32"):
        with fp8.computing_in(model, mode):
            seen[mode] = names()
    return seen | {"after": names()}


def test_a_mode_takes_the_middle_layers_and_gives_them_back() -> None:
    (seen,) = run_ranks(linears, 1)
    plain, rounded = ColumnParallelLinear.__name__, "Fp8ColumnParallelLinear_mxfp8"
    assert seen["before"] == seen["after"] == seen["fp32"] == [plain] * 4
    assert seen["mxfp8"] == [plain, rounded, rounded, plain]


def make_small(monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    small = override(tiny(), ["distill.num_problems=200", "distill.num_prompts=20", "distill.num_heldout=20",
                              "distill.num_validation=20", "curate.sft_examples=20"])  # fmt: skip
    monkeypatch.setattr(fp8, "tiny", lambda: small)
    monkeypatch.setattr(fp8, "WINDOW", window)
    monkeypatch.setattr(fp8, "WINDOWS_APART", 2 * window)


def test_arms_are_the_same_run_but_for_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch, window=4)
    rows: dict[str, Any] = {
        r["arm"]: r for r in fp8.run_seed(5, ["fp32", "fp32 again", "tensorwise"], 20)
    }
    mean = {arm: statistics.fmean(row["tenths"]) for arm, row in rows.items()}
    assert mean["fp32 again"] == pytest.approx(mean["fp32"], rel=1e-6)
    assert mean["tensorwise"] != mean["fp32"] and mean["tensorwise"] == pytest.approx(
        mean["fp32"], rel=0.01
    )
    same, back = rows["fp32"]["same_weights"], rows["tensorwise"]["same_weights"]
    assert same.keys() == {"own", *fp8.RECIPES} and back.keys() == {"own", "fp32"}
    assert len(set(same.values())) == 4 and same["tensorwise"] == pytest.approx(
        same["own"], rel=0.01
    )
    again = rows["fp32"]["same_state"]
    assert again.keys() == {"fp32", *fp8.RECIPES} and len(set(again.values())) == 4
    assert again["tensorwise"] == pytest.approx(again["fp32"], rel=0.01)
    assert rows["tensorwise"]["same_state"] == {}


def test_a_window_that_is_not_taken_back_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its steps in fp32 must give the same losses; they do not where the weights stay those after it."""
    make_small(monkeypatch, window=2)
    monkeypatch.setattr(fp8.Windows, "_restore", lambda self, tensors, steps: None)
    with pytest.raises(RuntimeError, match="did not give the same losses again"):
        list(fp8.run_seed(5, ["fp32"], 6))
