"""The plan's arithmetic against published numbers, and against bytes counted while a step runs on the CPU."""

import dataclasses

import pytest
from forked_ranks import run_ranks
from plan_cases import CONFIG, MIDTRAIN, PHI, RLVR, TOKENS, kept_bytes

from phimini.parallel.megatron.builder import build_model
from phimini.parallel.plan.layouts import Workload, flops_per_token, plan_stage
from phimini.parallel.plan.memory import (
    GIB,
    GPUS,
    SLEEPING_ENGINE_BYTES,
    MemoryOptions,
    Recompute,
    activation_elements,
    layer_bytes_per_token,
    memory_bytes,
    stage_parameters,
)
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize
from phimini.parallel.training.optimizer import OptimizerConfig, build_optimizer


def parts_of(layout: Layout, recompute: Recompute = "none", tokens: int = 16384) -> dict[str, int]:
    options = MemoryOptions(recompute=recompute)
    return memory_bytes(
        PHI, layout, options, tokens=tokens, sequence_length=tokens, num_microbatches=16
    )["training"]


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
    """44 GiB without recomputation, 30 with `selective`, 3 with `full`."""
    none = parts_of(Layout(data=8))["activations"] / GIB
    assert none == pytest.approx(44, abs=0.5)
    selective = parts_of(Layout(data=8), "selective")["activations"] / GIB
    assert selective == pytest.approx(30, abs=0.5)
    full = parts_of(Layout(data=8), "full")["activations"] / GIB
    assert full == pytest.approx(3, abs=0.1)
    assert parts_of(Layout(data=8), tokens=32768)["activations"] / GIB == pytest.approx(2 * none)


# GiB that one micro-batch of 2 x 8,192 tokens allocates at once, by `bench.system.step.traced` on fake tensors.
TRACED = {(1, "none"): 46.36, (1, "selective"): 32.36, (1, "full"): 5.31,
          (2, "none"): 24.41, (2, "selective"): 17.41, (2, "full"): 3.89}  # fmt: skip


@pytest.mark.parametrize(("tensor", "recompute"), TRACED)
def test_the_plan_is_the_peak_of_a_traced_step(tensor: int, recompute: Recompute) -> None:
    """A layer's backward and the head are never there together: the larger counts."""
    parts = parts_of(Layout(tensor=tensor, data=1, sequence_parallel=tensor > 1), recompute)
    planned = (parts["activations"] + parts["head"]) / GIB
    assert planned == pytest.approx(TRACED[tensor, recompute], rel=0.03)


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
    assert {p.recompute for p in planned} == {"none", "selective", "full"}
    peaks = {p.recompute: p.peak_bytes for p in planned if p.layout == Layout(context=2, data=4)}
    assert peaks["full"] < peaks["selective"] < peaks["none"]
    fp8 = dataclasses.replace(MIDTRAIN, fp8="blockwise")
    planned = plan_stage(PHI, fp8, GPUS["h100"], 8, best=1000).layouts
    assert {p.recompute for p in planned} == {"none", "full"}


def test_16k_on_eight_h100_is_data_parallel() -> None:
    """Without recomputation, since q, k and v are kept once: 75 of 79 GiB, 61 with selective recomputation."""
    plan = plan_stage(PHI, MIDTRAIN, GPUS["h100"], 8)
    best, second = plan.layouts[:2]
    assert plan.fits and best.fits
    assert best.layout == second.layout == Layout(data=8)
    assert (best.recompute, second.recompute) == ("none", "selective")
    assert best.peak_bytes / GIB == pytest.approx(74.7, abs=0.1)
    assert second.peak_bytes / GIB == pytest.approx(60.7, abs=0.1)
    on_b200 = plan_stage(PHI, MIDTRAIN, GPUS["b200"], 8).layouts[0]
    assert on_b200.layout == Layout(data=8) and on_b200.recompute == "none"


KV_BYTES = 8 * 25600 * 2 * 2 * 32 * 8 * 128


def phases_of(workload: Workload, layout: Layout, recompute: Recompute = "none") -> dict:
    plan = plan_stage(PHI, workload, GPUS["h100"], 8, layouts=[layout], recomputes=(recompute,))
    return plan.layouts[0].phases


def test_a_colocated_engine_sleeps_while_the_trainer_trains() -> None:
    layout = Layout(tensor=2, context=2, sequence_parallel=True)
    phases = phases_of(RLVR, layout)
    alone = phases_of(dataclasses.replace(RLVR, rollout_sequences=0), layout)
    assert set(alone) == {"training"} and set(phases) == {"training", "rollout"}
    # Training: what it needs alone, and what a sleeping engine does not give back.
    training = phases["training"]
    assert training["rollout_weights"] == training["rollout_kv"] == 0
    assert training == alone["training"] | {"rollout_residue": SLEEPING_ENGINE_BYTES}
    # Sampling: weights, gradients and optimizer stay, activations and the head's logits have gone.
    rollout = phases["rollout"]
    assert (
        rollout["rollout_weights"] == 2 * PHI.num_parameters and rollout["rollout_kv"] == KV_BYTES
    )
    assert rollout["activations"] == rollout["head"] == 0
    for part in training.keys() - {"activations", "head", "rollout_weights", "rollout_kv"}:
        assert rollout[part] == training[part], part


def test_the_peak_is_the_larger_phase_s_not_their_sum() -> None:
    by_activations = plan_stage(PHI, RLVR, GPUS["h100"], 8, layouts=[Layout(context=2)]).layouts
    few, many = by_activations[0], dataclasses.replace(RLVR, rollout_sequences=64)
    by_keys = plan_stage(PHI, many, GPUS["h100"], 8, layouts=[Layout(context=8)]).layouts[0]
    for planned, phase in ((few, "training"), (by_keys, "rollout")):
        sums = {name: sum(parts.values()) for name, parts in planned.phases.items()}
        assert planned.peak_bytes == sums[phase] == max(sums.values())
        assert planned.memory_bytes == planned.phases[phase]


def test_an_engine_over_several_gpus_divides_its_weights_and_keys() -> None:
    layout = Layout(tensor=2, context=2, sequence_parallel=True)
    over = {
        n: phases_of(dataclasses.replace(RLVR, rollout_tensor_parallel=n), layout)
        for n in (1, 2, 4, 16)
    }
    norms = 2 * (2 * 32 + 1) * PHI.model_dim
    for size in (2, 4):
        rollout = over[size]["rollout"]
        assert rollout["rollout_weights"] == (2 * PHI.num_parameters - norms) // size + norms
        assert rollout["rollout_kv"] == KV_BYTES // size
        assert over[size]["training"] == over[1]["training"]
    # 8 key heads over 16 GPUs: one each, twice.
    assert over[16]["rollout"]["rollout_kv"] == KV_BYTES // 8
    with pytest.raises(
        ValueError, match="Workload.rollout_tensor_parallel: expected at least 1, got 0"
    ):
        dataclasses.replace(RLVR, rollout_tensor_parallel=0)


CPU_LAYOUTS = {
    "tp1": Layout(),
    "tp2": Layout(tensor=2),
    "tp2-sp": Layout(tensor=2, sequence_parallel=True),
    "cp2": Layout(context=2, context_keys="gathered"),
    "cp2-ring": Layout(context=2, context_keys="ring"),
}
MODES: tuple[Recompute, ...] = ("none", "selective", "full")


def expected_bytes(layout: Layout, recompute: Recompute) -> float:
    options = MemoryOptions(recompute=recompute, element_bytes=4)
    kept, _ = layer_bytes_per_token(CONFIG, layout, options)
    residual_split = layout.tensor if layout.sequence_parallel else 1
    if recompute != "full":
        # Norms keep 1/rms; the CPU's attention keeps its output once more, per document.
        kept += 4 * 2 / residual_split
        if layout.context_keys != "ring":
            kept += 4 * activation_elements(CONFIG, layout)["attention out"]
    # Outside the layers: token ids and which rows they are, positions, the final norm's input and output (under
    # sequence parallelism gathered, and Megatron's buffer for gathers), the head's rows of it.
    ids = 8 * (1 + 5 * (layout.context > 1)) + 9 * (layout.tensor > 1)
    positions = 4
    residual = 4 * CONFIG.model_dim / residual_split
    copies = 4 * CONFIG.model_dim * (1 + (layout.context > 1) + layout.sequence_parallel)
    outside = ids + positions + residual + 4 / residual_split + copies
    return TOKENS // layout.context * (CONFIG.num_layers * kept + outside)


@pytest.mark.parametrize("name", CPU_LAYOUTS)
def test_activations_are_what_is_alive_before_backward(name: str) -> None:
    layout = CPU_LAYOUTS[name]

    def run() -> dict[Recompute, int]:
        world = initialize(layout, CONFIG)
        return {recompute: kept_bytes(world, recompute) for recompute in MODES}

    measured = run_ranks(run, layout.model_size)[0]
    for recompute in MODES:
        expected = expected_bytes(layout, recompute)
        assert measured[recompute] == pytest.approx(expected, rel=0.02), (recompute, measured, expected)  # fmt: skip


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
    )["training"]  # fmt: skip
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
