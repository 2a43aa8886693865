"""The plan's arithmetic against published numbers, and against bytes counted while a step runs on the CPU."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from phimini.model.config import ModelConfig, preset
from phimini.parallel.batch import Document, PackedBatch, pack
from phimini.parallel.builder import build_model
from phimini.parallel.launch import run_ranks
from phimini.parallel.layout import Layout
from phimini.parallel.optimizer import OptimizerConfig, build_optimizer
from phimini.parallel.plan import Workload, flops_per_token, main, plan_stage
from phimini.parallel.plan_memory import (
    GIB,
    GPUS,
    MemoryOptions,
    Recompute,
    activation_elements,
    memory_bytes,
    stage_parameters,
)
from phimini.parallel.step import forward_backward
from phimini.parallel.world import World, initialize

PHI = preset("phi-4-mini")
MIDTRAIN = Workload(stage="midtrain", sequence_length=16384, rows_per_step=128)
CONFIG = ModelConfig(
    num_layers=4, model_dim=64, num_heads=8, num_kv_heads=4, head_dim=16, mlp_dim=96, vocab_size=128,
    max_positions=1024, original_max_positions=1024,
)  # fmt: skip
TOKENS = 512


def parts_of(layout: Layout, recompute: Recompute = "none", tokens: int = 16384) -> dict[str, int]:
    options = MemoryOptions(recompute=recompute)
    return memory_bytes(
        PHI, layout, options, tokens=tokens, sequence_length=tokens, num_microbatches=16
    )


# --- published arithmetic ------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("layout", "gib"),
    [
        (Layout(data=8), 26.8),
        (Layout(tensor=2, data=4), 16.1),
        (Layout(tensor=4, data=2), 10.7),
        (Layout(tensor=8, data=1), 8.0),
        (Layout(context=2, data=4), 26.8),
    ],
    ids=["dp8", "tp2", "tp4", "tp8", "cp2"],
)
def test_weights_gradients_and_optimizer_on_eight_gpus(layout: Layout, gib: float) -> None:
    """bf16 weights 2 B, fp32 gradients 4 B, 12 B of masters and moments over data x context."""
    parts = parts_of(layout)
    static = parts["weights"] + parts["gradients"] + parts["optimizer"]
    assert static / GIB == pytest.approx(gib, abs=0.06)


def test_activations_of_16k_tokens() -> None:
    """44, 30 and 3 GiB for none, selective and full, beside what our attention core keeps twice."""
    twice = 2 * 16384 * 32 * (PHI.num_heads + PHI.num_kv_heads) * PHI.head_dim / GIB
    none = parts_of(Layout(data=8))["activations"] / GIB
    assert none - twice == pytest.approx(44, abs=0.5)
    selective = parts_of(Layout(data=8), "selective")["activations"] / GIB
    working_layer = 2 * 16384 * (2 * PHI.model_dim + PHI.mlp_dim) / GIB
    assert selective - twice - working_layer == pytest.approx(30, abs=0.5)
    full = parts_of(Layout(data=8), "full")["activations"] / GIB
    assert full - none / 32 == pytest.approx(3, abs=0.1)
    assert parts_of(Layout(data=8), tokens=32768)["activations"] / GIB == pytest.approx(2 * none)


def test_flops_and_speed_at_16k() -> None:
    assert flops_per_token(PHI, MIDTRAIN) / 1e9 == pytest.approx(32.7, abs=0.05)
    plan = plan_stage(PHI, MIDTRAIN, GPUS["h100"], 8)
    assert plan.tokens_per_second_per_gpu(0.45) == pytest.approx(13600, rel=0.005)
    # 128 GPUs at 6,780 tokens/s each (150 B tokens in 2 days) is 22 % of the peak.
    assert 6780 / plan.tokens_per_second_per_gpu(1.0) == pytest.approx(0.22, abs=0.005)
    short = Workload(
        stage="sft", sequence_length=16384, rows_per_step=128, document_length=2048,
        trained_share=0.5, extra_forwards=1,
    )  # fmt: skip
    forward = 2 * 3.2212e9 + 0.5 * 2 * 0.6146e9 + 2 * 32 * 24 * 128 * 2049
    assert flops_per_token(PHI, short) == pytest.approx(4 * forward, rel=1e-4)


def test_only_what_a_run_can_recompute_is_proposed() -> None:
    planned = plan_stage(PHI, MIDTRAIN, GPUS["h100"], 8, best=1000).layouts
    assert {p.recompute for p in planned} == {"none", "full"}


def test_16k_on_eight_h100_is_data_parallel_with_selective_recompute() -> None:
    """As published for Megatron's selective recomputation, of norm outputs and the SwiGLU product."""
    plan = plan_stage(PHI, MIDTRAIN, GPUS["h100"], 8, recomputes=("none", "selective", "full"))
    best = plan.layouts[0]
    assert plan.fits and best.fits
    assert best.layout == Layout(data=8) and best.recompute == "selective"
    assert best.peak_bytes / GIB == pytest.approx(66, abs=3)
    on_b200 = plan_stage(PHI, MIDTRAIN, GPUS["b200"], 8).layouts[0]
    assert on_b200.layout == Layout(data=8) and on_b200.recompute == "none"


# --- measured on the CPU -------------------------------------------------------------------------
def sum_of_squares(
    hidden_MD: Tensor, weight_VD: Tensor, batch: PackedBatch, *, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return hidden_MD.square().sum() + 0 * weight_VD.sum(), torch.tensor(1), {}


def saved_layer_bytes(world: World, recompute: Recompute) -> int:
    """What autograd keeps for the layers' backward on this rank: every storage once, no parameters."""
    model = build_model(CONFIG, world, recompute=recompute)
    parameters = {p.untyped_storage().data_ptr() for _, p in model.named_parameters()}
    storages: dict[int, int] = {}
    alive: list[Tensor] = []  # a storage that dies would lend its address to another
    done = False

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not done and storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    def head(hidden_MD: Tensor, *args, **kwargs):
        nonlocal done
        done = True  # backward's own forward, of full recomputation, is not kept
        return sum_of_squares(hidden_MD, *args, **kwargs)

    tokens = [i % CONFIG.vocab_size for i in range(TOKENS)]
    batch = pack([Document(tokens=tokens, targets=tokens)])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        forward_backward(model, [batch], head)
    return sum(storages.values())


CPU_LAYOUTS = {
    "tp1": Layout(),
    "tp2": Layout(tensor=2),
    "tp2-sp": Layout(tensor=2, sequence_parallel=True),
    "cp2": Layout(context=2),
}


def expected_layer_bytes(layout: Layout, recompute: Recompute) -> float:
    elements = activation_elements(CONFIG, layout)
    rows = TOKENS // layout.context
    residual_split = layout.tensor if layout.sequence_parallel else 1
    if recompute == "full":
        per_token = 4 * elements["norm inputs"] / 2
    else:
        # The CPU's attention keeps its output once more, per document, and norms keep 1/rms.
        copies = elements["attention out"] + CONFIG.num_heads / layout.tensor + 2 / residual_split
        per_token = 4 * (sum(elements.values()) + copies)
    # Outside the layers: token ids, the rope tables, the final norm.
    rope_tables = 4 * (CONFIG.head_dim + CONFIG.rotary_dim / 2)
    outside = (
        8
        + (rope_tables if recompute == "none" else 0)
        + 4 * (CONFIG.model_dim + 1) / residual_split
    )
    return rows * (CONFIG.num_layers * per_token + outside)


@pytest.mark.parametrize("name", CPU_LAYOUTS)
def test_activations_are_what_autograd_keeps(name: str) -> None:
    layout = CPU_LAYOUTS[name]

    def run() -> dict[Recompute, int]:
        world = initialize(layout, CONFIG)
        return {"none": saved_layer_bytes(world, "none"), "full": saved_layer_bytes(world, "full")}

    for recompute, measured in run_ranks(run, layout.model_size)[0].items():
        expected = expected_layer_bytes(layout, recompute)
        assert measured == pytest.approx(expected, rel=0.02), (recompute, measured, expected)


def held_bytes(layout: Layout, zero1: bool) -> dict[str, int]:
    model = build_model(CONFIG, initialize(layout, CONFIG), distributed_optimizer=zero1)
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-3, total_steps=2), distributed=zero1)
    optimizer.zero_grad()
    optimizer.step()
    state = [
        t.nbytes
        for part in optimizer.megatron.chained_optimizers
        for values in part.optimizer.state.values()
        for t in values.values()
        if t.numel() > 1
    ]
    return {
        "weights": sum(p.nbytes for _, p in model.named_parameters()),
        "gradients": sum(b.grad_data.nbytes for c in model.chunks for b in c.buffers),  # pyright: ignore[reportGeneralTypeIssues, reportAttributeAccessIssue]
        "optimizer": sum(state),
    }


@pytest.mark.parametrize(
    ("layout", "zero1"),
    [
        (Layout(data=1), False),
        (Layout(data=2), True),
        (Layout(tensor=2, pipeline=2, data=1), False),
        (Layout(pipeline=2, virtual_pipeline=2, data=1), False),
    ],
    ids=["one", "zero1", "tp2-pp2", "vpp"],
)
def test_weights_gradients_and_optimizer_are_what_is_allocated(layout: Layout, zero1: bool) -> None:
    ranks = run_ranks(held_bytes, layout.model_size * (layout.data or 1), layout, zero1)
    planned = memory_bytes(
        CONFIG, layout, MemoryOptions(zero1=zero1, element_bytes=4),
        tokens=TOKENS, sequence_length=TOKENS, num_microbatches=2,
    )  # fmt: skip
    fullest = max(ranks, key=lambda held: held["weights"])
    for part, measured in fullest.items():
        # Buckets are padded to multiples of 128 elements per data rank.
        assert planned[part] == pytest.approx(measured, rel=0.005), part


@pytest.mark.parametrize("pipeline", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_parameter_is_on_some_stage(pipeline: int, tied: bool) -> None:
    config = dataclasses.replace(PHI, tie_embeddings=tied)
    copies = config.vocab_size * config.model_dim if tied and pipeline > 1 else 0
    stages = stage_parameters(config, Layout(pipeline=pipeline))
    assert sum(stages) == config.num_parameters + copies


# --- the document --------------------------------------------------------------------------------
def test_json_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workloads = {
        "midtrain": MIDTRAIN,
        "rlvr": Workload(
            stage="rlvr", sequence_length=25600, rows_per_step=128, rollout_sequences=8
        ),
    }
    path = tmp_path / "plan.json"
    arguments = ["stage=midtrain", "gpu=h100", "gpus=8", "--json", str(path)]
    assert main(arguments, PHI, workloads) == 0
    document = json.loads(path.read_text())
    assert document["fits"] is True and document["because"] is None
    assert all(isinstance(a, str) for a in document["assumptions"])
    for layout in document["layouts"]:
        assert sum(layout["memory_bytes"].values()) == layout["peak_bytes"]
        assert layout["tokens_per_second_per_gpu_at_mfu"]["0.45"] == pytest.approx(13600, rel=0.005)
        assert layout["flops_per_token"] == pytest.approx(32.7e9, rel=0.002)
        shape = layout["layout"]
        assert shape["tensor"] * shape["pipeline"] * shape["context"] * shape["data"] == 8
    assert "tokens/s per GPU" in capsys.readouterr().out
    assert main(["gpus=64", "--json", str(path)], PHI, workloads) == 0
    document = json.loads(path.read_text())
    stages = document["stages"]
    assert set(stages) == {"midtrain", "rlvr"}
    peaks = {stage: plan["layouts"][0]["peak_bytes"] for stage, plan in stages.items()}
    assert document["stage"] == max(peaks, key=lambda stage: peaks[stage])
    parts = stages["rlvr"]["layouts"][0]["memory_bytes"]
    assert parts["rollout_weights"] == 2 * PHI.num_parameters
    assert parts["rollout_kv"] == 8 * 25600 * 2 * 2 * 32 * 8 * 128


def test_what_does_not_fit_says_why_and_what_would() -> None:
    long = Workload(stage="midtrain", sequence_length=65536, rows_per_step=128)
    plan = plan_stage(PHI, long, GPUS["h100"], 1)
    assert not plan.fits and plan.because is not None
    assert re.search(r"needs \d+\.\d GiB per GPU and a h100 has 75.1 to give", plan.because)
    assert "its largest parts are optimizer 42.9" in plan.because
    assert plan.because.endswith("; 2 GPUs would fit")
    assert plan.to_json()["fits"] is False and not any(p.fits for p in plan.layouts)
    with_fp8 = Workload(
        stage="midtrain", sequence_length=16384, rows_per_step=128, fp8="tensorwise"
    )
    parts = plan_stage(PHI, with_fp8, GPUS["h100"], 8).layouts[0].memory_bytes
    assert parts["fp8_copies"] / GIB == pytest.approx(6, abs=0.05)


def test_bad_requests_are_explained() -> None:
    odd = Workload(stage="x", sequence_length=1, rows_per_step=3, micro_rows=2)
    with pytest.raises(ValueError, match="rows_per_step 3 cannot be divided"):
        plan_stage(PHI, odd, GPUS["h100"], 16)
    with pytest.raises(ValueError, match="world size 6 is not a multiple"):
        plan_stage(PHI, MIDTRAIN, GPUS["h100"], 6, layouts=[Layout(tensor=4)])
    with pytest.raises(ValueError, match="trained_share"):
        Workload(stage="x", sequence_length=1, rows_per_step=1, trained_share=0)
    for arguments, message in (
        (["gpu=v100"], "expected one of a100, h100, h200, b200"),
        (["stage=sft"], "expected one of midtrain"),
        (["gpus=many"], "expected a number"),
        (["layout=best"], "unknown argument 'layout=best'"),
        (["--json"], "expected a path"),
    ):
        with pytest.raises(ValueError, match=message):
            main(arguments, PHI, {"midtrain": MIDTRAIN})
