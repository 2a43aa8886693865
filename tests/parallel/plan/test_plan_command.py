"""`phimini plan`: its JSON document, and refused input."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from plan_cases import MIDTRAIN, PHI, RLVR

from phimini.parallel.plan.command import print_plans
from phimini.parallel.plan.layouts import plan_stage
from phimini.parallel.plan.rates import GIB, GPUS
from phimini.parallel.plan.workload import Workload
from phimini.parallel.ranks.layout import Layout
from phimini.stages.cli import main as command_line


@pytest.mark.parametrize(
    ("recipe", "gpu", "layouts", "recomputes", "message"),
    [
        ("auto", "a100", None, ("none", "full"), "a GPU of compute capability 8.0 has no FP8 recipe"),
        ("mxfp8", "h100", None, ("none", "full"), "fp8_recipe=mxfp8: .* 9.0 can do tensorwise, blockwise"),
        ("blockwise", "h100", [Layout(tensor=8)], ("none",), r"over tensor 8 is .* not a multiple of 128"),
    ],
    ids=["no fp8", "other recipe", "shards"],
)  # fmt: skip
def test_fp8_that_a_run_would_refuse_is_refused(
    recipe: Any, gpu: str, layouts: Any, recomputes: Any, message: str
) -> None:
    odd = dataclasses.replace(PHI, mlp_dim=8256) if layouts else PHI
    workload = dataclasses.replace(MIDTRAIN, fp8=recipe)
    with pytest.raises(ValueError, match=message):
        plan_stage(odd, workload, GPUS[gpu], 8, layouts=layouts, recomputes=recomputes)


def test_only_layouts_whose_shards_fp8_can_take_are_proposed() -> None:
    narrow = dataclasses.replace(PHI, mlp_dim=8320)  # 65 x 128
    workload = dataclasses.replace(MIDTRAIN, fp8="blockwise")
    planned = plan_stage(narrow, workload, GPUS["h100"], 8, best=1000).layouts
    assert {p.layout.tensor for p in planned} == {1}


def test_json_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workloads = {
        "midtrain": MIDTRAIN,
        "rlvr": RLVR,
    }
    path = tmp_path / "plan.json"
    assert print_plans(PHI, {"midtrain": MIDTRAIN}, "h100", 8, str(path)) == 0
    document = json.loads(path.read_text())
    assert document["fits"] is True and document["because"] is None
    assert all(isinstance(a, str) for a in document["assumptions"])
    for layout in document["layouts"]:
        assert sum(layout["memory_bytes"].values()) == layout["peak_bytes"]
        speed, seconds = (
            layout[f"predicted_{n}"] for n in ("tokens_per_second_per_gpu", "seconds_per_step")
        )
        assert speed == pytest.approx(128 * 16384 / 8 / seconds, rel=1e-3)
        assert layout["predicted_mfu"] == pytest.approx(speed * 32.68e9 / 989e12, rel=1e-3)
        assert layout["flops_per_token"] == pytest.approx(32.7e9, rel=0.002)
        shape = layout["layout"]
        assert shape["tensor"] * shape["pipeline"] * shape["context"] * shape["data"] == 8
    assert document["rates"]["gemm"] == 660e12 and document["rates"]["fa3_forward"] == 618e12
    printed = capsys.readouterr().out
    assert "tokens/s per GPU, MFU" in printed and "no measurements" in printed
    assert print_plans(PHI, workloads, "h100", 64, str(path)) == 0
    document = json.loads(path.read_text())
    stages = document["stages"]
    assert set(stages) == {"midtrain", "rlvr"}
    peaks = {stage: plan["layouts"][0]["peak_bytes"] for stage, plan in stages.items()}
    assert document["stage"] == max(peaks, key=lambda stage: peaks[stage])
    best = stages["rlvr"]["layouts"][0]
    assert set(best["phases"]) == {"training", "rollout"}
    assert best["peak_bytes"] == max(sum(parts.values()) for parts in best["phases"].values())


def test_what_does_not_fit_says_why_and_what_would() -> None:
    long = Workload(stage="midtrain", sequence_length=65536, rows_per_step=128)
    plan = plan_stage(PHI, long, GPUS["h100"], 1)
    assert not plan.fits and plan.because is not None
    assert re.search(r"needs \d+\.\d GiB per GPU and a h100 has 71.2 to give", plan.because)
    assert "its largest parts are optimizer 42.9" in plan.because
    assert plan.because.endswith("; 2 GPUs would fit")
    assert plan.to_json()["fits"] is False and not any(p.fits for p in plan.layouts)
    with_fp8 = Workload(
        stage="midtrain", sequence_length=16384, rows_per_step=128, fp8="tensorwise"
    )
    parts = plan_stage(PHI, with_fp8, GPUS["h100"], 8).layouts[0].memory_bytes
    # Of 30 layers' linears one byte is the weight and one its transposed copy.
    assert parts["fp8_copies"] / GIB == pytest.approx(30 / 32 * 3.0, abs=0.01)
    assert parts["weights"] / GIB == pytest.approx(7.145 - 30 / 32 * 3.0, abs=0.01)


def test_replicas_that_rows_do_not_divide_over_are_planned_and_come_last() -> None:
    plan = plan_stage(PHI, MIDTRAIN, GPUS["h100"], 6)
    rows, micro = MIDTRAIN.rows_per_step, MIDTRAIN.micro_rows
    for planned in plan.layouts:
        data = planned.layout.data
        assert data in (1, 2, 3, 6)
        assert planned.num_microbatches == -(-rows // (data * micro))
    # Of two layouts alike but for the rows, the one whose replicas all have work is cheaper.
    one = [Layout(context=2)]
    costs = [
        plan_stage(
            PHI,
            dataclasses.replace(MIDTRAIN, rows_per_step=n),
            GPUS["h100"],
            8,
            layouts=one,
            recomputes=("none",),
        )
        .layouts[0]
        .time.total
        for n in (8, 9)
    ]
    # 2 and 3 micro-batches; the optimizer and what follows it are the same.
    assert costs[1] > 1.4 * costs[0]


def test_bad_requests_are_explained() -> None:
    with pytest.raises(ValueError, match="world size 6 is not a multiple"):
        plan_stage(PHI, MIDTRAIN, GPUS["h100"], 6, layouts=[Layout(tensor=4)])
    with pytest.raises(ValueError, match="trained_share"):
        Workload(stage="x", sequence_length=1, rows_per_step=1, trained_share=0)
    for gpu, path, message in (
        ("v100", None, "expected one of a100, h100, h200, b200"),
        ("h100", "/nowhere/plan.json", "plan json=/nowhere/plan.json: cannot be written: No such"),
    ):
        with pytest.raises(ValueError, match=message):
            print_plans(PHI, {"midtrain": MIDTRAIN}, gpu, 8, path)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("stage=stf", "stage: did you mean sft? expected one of midtrain, sft, rollout_dpo, rlvr, got 'stf'"),
        ("gpus=many", "gpus: expected a whole number from 1 to 1000000000, got 'many'"),
        ("gpus=²", "gpus: expected a whole number from 1 to 1000000000, got '²'"),
        ("gpus=0", "gpus: expected a whole number from 1 to 1000000000, got 0"),
        ("layout=best", "plan: unknown 'layout=best'"),
        ("--json", "plan: --json: expected a value after it"),
        ("gpu=v100", "plan gpu=v100: did you mean h100? expected one of a100, h100, h200, b200"),
    ],
)  # fmt: skip
def test_bad_words_are_explained(word: str, message: str, capsys: pytest.CaptureFixture) -> None:
    assert command_line(["plan", "tiny", word]) == 2
    assert message in capsys.readouterr().err
