"""Golden losses: real stages give the same bits twice, layouts agree at step 1, and a difference has a name."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch

from phimini.bench.gate import golden
from phimini.bench.gate.compare import BASELINES
from phimini.bench.gate.environment import environment
from phimini.bench.gate.golden import Losses, bless, compare_with, layouts_that_differ, measure
from phimini.model.io.json_files import read_json, write_json

HERE = dataclasses.replace(environment(), dirty=False)
LOSSES: Losses = {
    stage: {"1": [[1.0, 2.0], [0.5, 1.0]], "tp2": [[1.0, 2.000001], [0.5, 1.1]]} for stage in golden.STAGES
}  # fmt: skip


@pytest.fixture(scope="module")
def measured() -> Losses:
    """One rank, and two with tensor and sequence parallelism (whose batches are padded)."""
    return measure(["tp2-sp"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="two ranks; this is the CPU's")
def test_layouts_agree_at_step_1_in_every_stage(measured: Losses) -> None:
    assert {stage: sorted(of) for stage, of in measured.items()} == {
        s: ["1", "tp2-sp"] for s in golden.STAGES
    }
    assert all(len(steps) >= 2 for of in measured.values() for steps in of.values())
    assert layouts_that_differ(measured, golden.STEP_1["cpu"]) == []
    assert (
        layouts_that_differ(measured, 0.0) != []
    )  # it is another order of sums, not the same run read twice


@pytest.mark.skipif(torch.cuda.is_available(), reason="two ranks; this is the CPU's")
def test_a_second_run_is_bit_equal(measured: Losses) -> None:
    again = measure(["1"])
    assert {s: again[s]["1"] for s in again} == {s: measured[s]["1"] for s in measured}


@pytest.mark.skipif(torch.cuda.is_available(), reason="two ranks; this is the CPU's")
def test_the_committed_numbers_of_this_device(measured: Losses) -> None:
    path = Path(__file__).parents[3] / BASELINES / HERE.slug / "golden.json"
    verdict = compare_with(measured, dataclasses.replace(HERE, threads=1), path, partial=True)
    if verdict.status == 3:
        pytest.skip(verdict.lines[0])
    assert verdict.lines == []


def test_verdicts(tmp_path: Path) -> None:
    path = tmp_path / "golden.json"
    assert compare_with(LOSSES, HERE, path) == golden.Verdict(
        3, [f"no baseline: {path} does not exist"]
    )
    bless(LOSSES, HERE, path, "first")
    assert compare_with(LOSSES, HERE, path) == golden.Verdict(0, [])

    other = copy.deepcopy(LOSSES)
    other["sft"]["tp2"][1][1] = 1.1000000000000003  # one bit
    verdict = compare_with(other, HERE, path)
    assert verdict.status == 1
    assert verdict.lines == ["sft, layout tp2, step 2: grad_norm 1.1000000000000003, committed 1.1"]
    other["sft"]["tp2"].pop()
    assert compare_with(other, HERE, path).lines == ["sft, layout tp2: 1 steps, committed 2"]

    single = {stage: {"1": of["1"]} for stage, of in LOSSES.items()}
    assert compare_with(single, HERE, path).status == 3
    assert compare_with(single, HERE, path, partial=True).status == 0
    more = {stage: of | {"pp2": of["1"]} for stage, of in LOSSES.items()}
    assert compare_with(more, HERE, path).lines[0] == "no baseline: midtrain, layout pp2"


def test_another_device_or_version_is_no_pass(tmp_path: Path) -> None:
    path = tmp_path / "golden.json"
    bless(LOSSES, HERE, path, "first")
    newer = dataclasses.replace(HERE, versions=HERE.versions | {"torch": "3.0"})
    for here, said in ((dataclasses.replace(HERE, device="x"), "is x"), (newer, "is 3.0"),
                       (dataclasses.replace(HERE, threads=99), "is 99")):  # fmt: skip
        verdict = compare_with(LOSSES, here, path)
        assert (
            verdict.status == 3
            and verdict.lines[0].startswith("stale baseline: ")
            and said in verdict.lines[0]
        )
    write_json(path, read_json(path) | {"settings": ["processes=1"]})
    assert "other settings" in compare_with(LOSSES, HERE, path).lines[0]


def test_step_1_of_a_layout_that_is_off_is_named() -> None:
    assert layouts_that_differ(LOSSES, 1e-5) == []
    other = copy.deepcopy(LOSSES)
    other["rlvr"]["tp2"][0] = [1.01, float("nan")]
    assert layouts_that_differ(other, 1e-5) == [
        "rlvr, layout tp2, step 1: loss 1.01, one rank has 1.0",
        "rlvr, layout tp2, step 1: grad_norm nan, one rank has 2.0",
    ]


def test_bless_keeps_reasons_and_refuses(tmp_path: Path) -> None:
    path = tmp_path / "golden.json"
    bless(LOSSES, HERE, path, "first")
    bless(LOSSES, HERE, path, "second")
    assert [b["reason"] for b in read_json(path)["blessings"]] == ["first", "second"]
    with pytest.raises(ValueError, match="--reason: expected a sentence"):
        bless(LOSSES, HERE, path, " ")
    with pytest.raises(ValueError, match="uncommitted changes"):
        bless(LOSSES, dataclasses.replace(HERE, dirty=True), path, "x")
    write_json(path, {"schema": 0})
    with pytest.raises(ValueError, match="golden.json: schema: expected 1, got 0"):
        compare_with(LOSSES, HERE, path)


@pytest.mark.parametrize(("layouts", "unknown"), [("1,tp3", "tp3"), ("", "")])
def test_an_unknown_layout_is_named(
    layouts: str, unknown: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(golden, "_run", None)  # nothing is measured
    assert golden.main(["--layouts", layouts]) == 2
    assert f"unknown layout {unknown!r}; expected some of ['1', 'tp2'" in capsys.readouterr().err
