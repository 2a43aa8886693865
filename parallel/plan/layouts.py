"""Plan a stage before it uses a GPU: memory, FLOPs and the best few layouts.

    plan = plan_stage(preset("phi-4-mini"), Workload(stage="midtrain", ...), GPUS["h100"], world_size=8)
    plan.to_json()      {"fits": ..., "layouts": [...], "assumptions": [...]}

Memory is arithmetic over the tensors that the code keeps (`memory.py`); tests compare it with bytes measured on a CPU and
with a full-size step traced on fake tensors.
Time is stated for a given MFU and never predicted.
"""

import math
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, get_args

import torch

from phimini.model.config import (
    ModelConfig,
    attention_flops,
    head_flops_per_token,
    layer_flops_per_token,
)
from phimini.parallel.megatron import fp8
from phimini.parallel.plan.memory import (
    CUDA_BYTES,
    GIB,
    NCCL_BYTES_PER_GROUP,
    SLEEPING_ENGINE_BYTES,
    Fp8,
    Gpu,
    MemoryOptions,
    Recompute,
    memory_bytes,
    stage_layers,
)
from phimini.parallel.ranks.layout import Layout

RESERVE = 0.05
"""share of a GPU's memory reserved for fragmentation and for allocations that this plan does not model"""
MFUS = (0.40, 0.45, 0.50)
GPUS_PER_NODE = 8
# Estimated costs of each choice, used only to order the layouts that fit. They follow the usual advice: data parallel
# first, tensor, context and pipeline parallel only if memory requires it.
_RECOMPUTE_COST = {"none": 0.0, "selective": 0.02, "full": 1 / 3}
_TENSOR_COST_PER_DOUBLING = 0.06
_CONTEXT_COST_PER_DOUBLING = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One stage's step, in rows: packed rows, single sequences, or the two answers of a pair."""

    stage: str
    sequence_length: int
    """tokens of a row"""
    rows_per_step: int
    """rows in the global batch"""
    micro_tokens: int | None = None
    """tokens that one rank computes at once; None: one row"""
    document_length: int | None = None
    """tokens of a document inside a packed row, for attention's FLOPs; None: one document fills the row"""
    trained_share: float = 1.0
    """share of the tokens with a loss; the head computes only these"""
    extra_forwards: float = 0.0
    """additional forward passes (a DPO reference: 1), counted as model FLOPs"""
    reference_model: bool = False
    """a frozen copy of the model in memory"""
    pair_scratches: int = 0
    """see `MemoryOptions`"""
    samples_per_step: int = 0
    """upper bound of the answers that a step samples; their memory and FLOPs are not counted"""
    samples_before: int = 0
    """answers sampled before the first step"""
    rollout_sequences: int = 0
    """sequences in flight of a rollout engine on the same GPU; 0: the engine runs elsewhere"""
    rollout_tensor_parallel: int = 1
    """GPUs that share that engine"""
    fp8: Fp8 = "none"
    zero1: bool = True

    def __post_init__(self) -> None:
        for name in ("sequence_length", "rows_per_step", "micro_rows", "rollout_tensor_parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"Workload.{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.trained_share <= 1:
            raise ValueError(
                f"Workload.trained_share: expected a share in (0, 1], got {self.trained_share}"
            )
        if self.fp8 not in get_args(Fp8):
            raise ValueError(f"Workload.fp8: expected one of {get_args(Fp8)}, got {self.fp8!r}")

    @property
    def micro_rows(self) -> int:
        """Whole rows that one rank computes at once."""
        return (self.micro_tokens or self.sequence_length) // self.sequence_length


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedLayout:
    """One layout with its memory and estimated cost."""

    layout: Layout
    recompute: Recompute
    num_microbatches: int
    phases: dict[str, dict[str, int]]
    """bytes by phase (`training`, and `rollout` if an engine shares the GPU) and part"""
    fits: bool
    relative_cost: float
    """cost of a step relative to a layout without communication or recomputation; for the order only"""

    @property
    def memory_bytes(self) -> dict[str, int]:
        """Bytes by part, in the phase that needs the most."""
        return max(self.phases.values(), key=lambda parts: sum(parts.values()))

    @property
    def peak_bytes(self) -> int:
        """Bytes of the phase that needs the most."""
        return sum(self.memory_bytes.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The layouts of one stage on a number of GPUs, or the reason why it does not fit."""

    workload: Workload
    gpu: Gpu
    world_size: int
    flops_per_token: float
    layouts: list[PlannedLayout]
    """best first; layouts that do not fit are listed only if no layout fits"""
    because: str | None
    """the reason why no layout fits, and a change that would; None if one fits"""
    assumptions: list[str]

    @property
    def fits(self) -> bool:
        """True if at least one layout fits."""
        return self.because is None

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the global batch."""
        return self.workload.rows_per_step * self.workload.sequence_length

    def tokens_per_second_per_gpu(self, mfu: float) -> float:
        """Return the speed that a given MFU means."""
        return mfu * self.gpu.peak_flops / self.flops_per_token

    def seconds_per_step(self, mfu: float) -> float:
        """Return the duration of a step that a given MFU means."""
        return self.tokens_per_step / (self.tokens_per_second_per_gpu(mfu) * self.world_size)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as `phimini plan --json` writes it."""
        speed = {f"{mfu:.2f}": round(self.tokens_per_second_per_gpu(mfu)) for mfu in MFUS}
        seconds = {f"{mfu:.2f}": round(self.seconds_per_step(mfu), 3) for mfu in MFUS}
        return {
            "fits": self.fits,
            "because": self.because,
            "stage": self.workload.stage,
            "gpu": self.gpu.name,
            "gpus": self.world_size,
            "tokens_per_step": self.tokens_per_step,
            "samples_per_step": self.workload.samples_per_step,
            "samples_before": self.workload.samples_before,
            "layouts": [
                {
                    "layout": asdict(planned.layout)
                    | {"recompute": planned.recompute, "zero1": self.workload.zero1},
                    "fits": planned.fits,
                    "num_microbatches": planned.num_microbatches,
                    "memory_bytes": planned.memory_bytes,
                    "peak_bytes": planned.peak_bytes,
                    "phases": planned.phases,
                    "flops_per_token": self.flops_per_token,
                    "tokens_per_second_per_gpu_at_mfu": speed,
                    "seconds_per_step_at_mfu": seconds,
                }
                for planned in self.layouts
            ],
            "assumptions": self.assumptions,
        }


def flops_per_token(config: ModelConfig, workload: Workload) -> float:
    """Return the model FLOPs of a step per token of a row: forward, backward (twice forward) and extra forwards."""
    length = min(workload.document_length or workload.sequence_length, workload.sequence_length)
    forward = (
        layer_flops_per_token(config)
        + workload.trained_share * head_flops_per_token(config)
        + attention_flops(config, [0, length]) / length
    )
    return (3 + workload.extra_forwards) * forward


def plan_stage(
    config: ModelConfig,
    workload: Workload,
    gpu: Gpu,
    world_size: int,
    *,
    layouts: list[Layout] | None = None,
    recomputes: tuple[Recompute, ...] = get_args(Recompute),
    best: int = 5,
) -> Plan:
    """Return the `best` layouts of `world_size` GPUs for a workload, or, if all are too large, the smallest and the reason.

    recomputes: consider only these modes; `selective` is left out with FP8, because a run refuses it.
    layouts: consider only these (as given, or with `data` None).

    Raises ValueError for settings that a run refuses: a layout that does not divide the world, the model or its FP8
    products, or an FP8 recipe that the GPU does not support.
    """
    if world_size < 1:
        raise ValueError(f"plan: expected at least 1 GPU, got {world_size}")
    if workload.fp8 != "none" and len(recomputes) == 1:
        fp8.check_recompute(recomputes[0], _fp8(workload, gpu))
    candidates = _planned(config, workload, gpu, world_size, layouts, recomputes)
    if not candidates:
        raise ValueError(
            f"plan, {workload.stage}: no layout of {world_size} GPUs gives {workload.fp8} FP8 products that divide"
        )
    fitting = sorted((c for c in candidates if c.fits), key=lambda c: c.relative_cost)
    because = None
    if not fitting:
        candidates.sort(key=lambda c: c.peak_bytes)
        because = _why_not(config, workload, gpu, world_size, candidates[0], layouts)
    return Plan(
        workload=workload,
        gpu=gpu,
        world_size=world_size,
        flops_per_token=flops_per_token(config, workload),
        layouts=(fitting or candidates)[:best],
        because=because,
        assumptions=_assumptions(workload, gpu),
    )


def _planned(
    config: ModelConfig,
    workload: Workload,
    gpu: Gpu,
    world_size: int,
    layouts: list[Layout] | None,
    recomputes: tuple[Recompute, ...] = get_args(Recompute),
) -> list[PlannedLayout]:
    resolved = (
        [layout.resolve(world_size, config) for layout in layouts]
        if layouts is not None
        else _possible_layouts(config, world_size)
    )
    if workload.fp8 != "none":
        resolved = _aligned(config, _fp8(workload, gpu), resolved, ask=layouts is None)
    planned = []
    for layout, recompute in product(resolved, recomputes):
        assert layout.data is not None, "resolve fills it in"
        if recompute == "selective" and workload.fp8 != "none":
            continue
        # Replicas with fewer rows run idle micro-batches; interleaved stages are padded to multiples of `pipeline`.
        num_microbatches = -(-workload.rows_per_step // (layout.data * workload.micro_rows))
        if layout.virtual_pipeline > 1:
            num_microbatches += -num_microbatches % layout.pipeline
        options = MemoryOptions(
            recompute=recompute,
            zero1=workload.zero1,
            fp8=workload.fp8,
            reference_model=workload.reference_model,
            pair_scratches=workload.pair_scratches,
            rollout_sequences=workload.rollout_sequences,
            rollout_tensor_parallel=workload.rollout_tensor_parallel,
        )
        phases = memory_bytes(
            config, layout, options,
            tokens=workload.micro_tokens or workload.sequence_length,
            sequence_length=workload.sequence_length,
            num_microbatches=num_microbatches,
        )  # fmt: skip
        planned.append(
            PlannedLayout(
                layout=layout,
                recompute=recompute,
                num_microbatches=num_microbatches,
                phases=phases,
                fits=max(sum(p.values()) for p in phases.values())
                <= (1 - RESERVE) * gpu.memory_bytes,
                relative_cost=_relative_cost(config, workload, layout, recompute, num_microbatches),
            )
        )
    return planned


def _possible_layouts(config: ModelConfig, world_size: int) -> list[Layout]:
    """Return the layouts that divide world and model, with tensor parallelism inside a node and one chunk per stage."""
    found = []
    for tensor, pipeline, context in product((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8, 16)):
        layout = Layout(
            tensor=tensor, pipeline=pipeline, context=context, sequence_parallel=tensor > 1
        )
        if tensor > min(GPUS_PER_NODE, world_size):
            continue
        try:
            found.append(layout.resolve(world_size, config))
        except ValueError:
            continue  # not a layout of this world and model
    return found


def _fp8(workload: Workload, gpu: Gpu) -> fp8.Fp8:
    assert workload.fp8 != "none", "asked only where there is FP8"
    chosen = fp8.choose("te", workload.fp8, torch.device("cuda"), gpu.capability)
    assert chosen is not None, "mode te is FP8, or an error"
    return chosen


def _aligned(
    config: ModelConfig, how: fp8.Fp8, layouts: list[Layout], *, ask: bool
) -> list[Layout]:
    """Return the layouts whose shards fit FP8 products. Raises ValueError for any other unless `ask`."""
    found = []
    for layout in layouts:
        try:
            fp8.check_alignment(config, layout, how)
        except ValueError:
            if not ask:
                raise
        else:
            found.append(layout)
    return found


def _relative_cost(
    config: ModelConfig,
    workload: Workload,
    layout: Layout,
    recompute: Recompute,
    num_microbatches: int,
) -> float:
    tensor = _TENSOR_COST_PER_DOUBLING * (layout.tensor.bit_length() - 1)
    context = _CONTEXT_COST_PER_DOUBLING * (layout.context.bit_length() - 1)
    # The other pipeline stages wait for the slowest; the last one has the head.
    head = workload.trained_share * head_flops_per_token(config) * (3 + workload.extra_forwards)
    whole = flops_per_token(config, workload)
    costs = [n * (whole - head) / config.num_layers for n in stage_layers(config, layout)]
    costs[-1] += head
    imbalance = max(costs) * layout.pipeline / whole - 1
    bubble = (layout.pipeline - 1) / (num_microbatches * layout.virtual_pipeline)
    assert layout.data is not None, "resolved"
    places = num_microbatches * layout.data * workload.micro_rows
    idle = places / workload.rows_per_step - 1
    factors = (_RECOMPUTE_COST[recompute], tensor, context, imbalance, bubble, idle)
    return math.prod(1 + factor for factor in factors)


def _why_not(
    config: ModelConfig,
    workload: Workload,
    gpu: Gpu,
    world_size: int,
    nearest: PlannedLayout,
    layouts: list[Layout] | None,
) -> str:
    usable = (1 - RESERVE) * gpu.memory_bytes
    largest = sorted(nearest.memory_bytes.items(), key=lambda part: -part[1])[:3]
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest)
    text = (
        f"the smallest layout still needs {nearest.peak_bytes / GIB:.1f} GiB per GPU and a {gpu.name} has "
        f"{usable / GIB:.1f} to give; its largest parts are {parts} GiB"
    )
    if layouts is not None:
        return text
    for more in (world_size * 2**i for i in range(1, 8)):
        if any(c.fits for c in _planned(config, workload, gpu, more, None)):
            return f"{text}; {more} GPUs would fit"
    if workload.micro_rows > 1:
        smaller = replace(workload, micro_tokens=None)
        if any(c.fits for c in _planned(config, smaller, gpu, world_size, None)):
            return f"{text}; micro-batches of 1 row would fit"
    return text


def _assumptions(workload: Workload, gpu: Gpu) -> list[str]:
    stated = [
        "bf16 weights and activations, fp32 gradients, masters and moments",
        f"{gpu.name}: {gpu.memory_bytes / GIB:.1f} GiB, of which {RESERVE:.0%} stay free; "
        f"{gpu.peak_flops / 1e12:.0f} TFLOP/s dense bf16, also the base of MFU in fp8 runs",
        "FLOPs: multiply-add is 2, causal attention within documents, recomputation not counted",
        "speeds are what the stated MFU means, not predictions; layouts are ordered by estimated overheads",
        f"estimates: {NCCL_BYTES_PER_GROUP / GIB:.2f} GiB per NCCL group, {CUDA_BYTES / GIB:.1f} GiB for "
        "CUDA's context and libraries",
        "recompute: none, selective (outputs of norms and SwiGLU are made again) or full (whole layers)",
    ]
    if workload.zero1:
        stated.append("optimizer state divided over data x context ranks (ZeRO-1)")
    if workload.fp8 != "none":
        stated.append("fp8: two one-byte copies of every linear in the layers; the head stays bf16")
    if workload.rollout_sequences:
        shared = (
            f", over {workload.rollout_tensor_parallel} GPUs"
            if workload.rollout_tensor_parallel > 1
            else ""
        )
        stated.append(
            f"a rollout engine on the same GPU{shared}: its own bf16 weights, and keys and values of "
            f"{workload.rollout_sequences} sequences of {workload.sequence_length} tokens; it sleeps while the trainer "
            f"trains and then keeps {SLEEPING_ENGINE_BYTES / GIB:.1f} GiB (an estimate), and while it samples the trainer "
            "keeps weights, gradients and optimizer state: the larger of the two phases counts"
        )
    return stated
