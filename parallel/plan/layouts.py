"""Plan a stage before it uses a GPU: memory, predicted time, FLOPs and the best few layouts.

    plan = plan_stage(preset("phi-4-mini"), Workload(stage="midtrain", ...), GPUS["h100"], world_size=8)
    plan.to_json()      {"fits": ..., "layouts": [...], "assumptions": [...]}

Memory is arithmetic over the tensors that the code keeps (`memory.py`); tests compare it with bytes measured on a CPU and
with a full-size step traced on fake tensors. Time is predicted (`step_time.py`) from counted operations and stated rates.
"""

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
from phimini.parallel.plan.engine import (
    ENGINE_BYTES,
    MEAN_CONTEXT,
    SLEEPING_ENGINE_BYTES,
    EngineMemory,
    engine_memory,
)
from phimini.parallel.plan.memory import (
    CUDA_BYTES,
    NCCL_BYTES_PER_GROUP,
    MemoryOptions,
    Recompute,
    held_while_sampling,
    memory_bytes,
)
from phimini.parallel.plan.rates import GIB, RATES, RESERVE, Gpu, table
from phimini.parallel.plan.step_time import GPUS_PER_NODE, StepTime, predict
from phimini.parallel.plan.workload import Workload
from phimini.parallel.ranks.layout import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedLayout:
    """One layout with its memory and estimated cost."""

    layout: Layout
    recompute: Recompute
    num_microbatches: int
    phases: dict[str, dict[str, int]]
    """bytes by phase (`training`, and `rollout` if an engine shares the GPU) and part"""
    fits: bool
    time: StepTime
    """predicted seconds of a step"""
    engine: EngineMemory | None
    """memory of a rollout engine on the same GPUs"""

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

    def tokens_per_second_per_gpu(self, planned: PlannedLayout) -> float:
        """Return the predicted speed of a layout."""
        return self.tokens_per_step / planned.time.total / self.world_size

    def mfu(self, planned: PlannedLayout) -> float:
        """Return the predicted share of the peak FLOP/s that the model's own FLOPs take."""
        speed = self.tokens_per_second_per_gpu(planned)
        return self.flops_per_token * speed / self.gpu.peak_flops

    def to_json(self) -> dict[str, Any]:
        """Return the plan as `phimini plan --json` writes it."""
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
                    "predicted_seconds_per_step": round(planned.time.total, 4),
                    "predicted_tokens_per_second_per_gpu": round(
                        self.tokens_per_second_per_gpu(planned)
                    ),
                    "predicted_mfu": round(self.mfu(planned), 4),
                    "engine": None if planned.engine is None else asdict(planned.engine),
                }
                for planned in self.layouts
            ],
            "rates": table(self.gpu),
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
    """Return the `best` layouts of `world_size` GPUs for a workload, those with the lowest predicted time first.

    If all are too large, it has the smallest and the reason.
    recomputes: consider only these modes.
    layouts: consider only these (as given, or with `data` None).

    Raises ValueError for settings that a run refuses: a layout that does not divide the world, the model or its FP8
    products, or an FP8 recipe that the GPU does not support.
    """
    if world_size < 1:
        raise ValueError(f"plan: expected at least 1 GPU, got {world_size}")
    if workload.fp8 != "none":
        workload = replace(workload, fp8=_fp8(workload, gpu).recipe)
    candidates = _planned(config, workload, gpu, world_size, layouts, recomputes)
    if not candidates:
        raise ValueError(
            f"plan, {workload.stage}: no layout of {world_size} GPUs gives {workload.fp8} FP8 products that divide"
        )
    fitting = sorted((c for c in candidates if c.fits), key=lambda c: c.time.total)
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
            engine=workload.engine,
        )
        phases = memory_bytes(
            config, layout, options,
            tokens=workload.micro_tokens or workload.sequence_length,
            num_microbatches=num_microbatches,
            gpu_bytes=gpu.memory_bytes,
        )  # fmt: skip
        engine = None
        if workload.engine is not None:
            held = held_while_sampling(phases)
            engine = engine_memory(config, workload.engine, gpu.memory_bytes, held)
        planned.append(
            PlannedLayout(
                layout=layout,
                recompute=recompute,
                num_microbatches=num_microbatches,
                phases=phases,
                fits=max(sum(p.values()) for p in phases.values()) <= gpu.usable_bytes,
                time=predict(config, workload, gpu, layout, recompute, num_microbatches),
                engine=engine,
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


def _why_not(
    config: ModelConfig,
    workload: Workload,
    gpu: Gpu,
    world_size: int,
    nearest: PlannedLayout,
    layouts: list[Layout] | None,
) -> str:
    largest = sorted(nearest.memory_bytes.items(), key=lambda part: -part[1])[:3]
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest)
    text = (
        f"the smallest layout still needs {nearest.peak_bytes / GIB:.1f} GiB per GPU and a {gpu.name} has "
        f"{gpu.usable_bytes / GIB:.1f} to give; its largest parts are {parts} GiB"
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
        f"times are predictions, no measurements: counted operations over the rates of an H100, scaled to a {gpu.name}'s "
        "data sheet: "
        + "; ".join(f"{n} {r.value / 1e12:g}e12 ({r.source})" for n, r in RATES.items()),
        f"estimates: {NCCL_BYTES_PER_GROUP / GIB:.2f} GiB per NCCL group, {CUDA_BYTES / GIB:.1f} GiB for "
        "CUDA's context and libraries",
        "recompute: none, selective (outputs of norms and SwiGLU are made again) or full (whole layers)",
    ]
    if workload.zero1:
        stated.append("optimizer state divided over data x context ranks (ZeRO-1)")
    if workload.fp8 != "none":
        stated.append(
            "fp8: two one-byte copies of the linears between the first and the last layer (with ZeRO-1 and not mxfp8 one of "
            "them is the weight), their inputs kept in one byte; the head stays bf16; by Transformer Engine's source, not traced"
        )
    if workload.engine is not None:
        size = workload.engine.tensor_parallel
        shared = f", over {size} GPUs" if size > 1 else ""
        stated.append(
            f"a rollout engine on the same GPU{shared}: its own bf16 weights, {ENGINE_BYTES / GIB:.1f} GiB for its "
            "computation (an estimate), and keys and values in what is left; at least one sequence of "
            f"{workload.engine.longest} tokens, and as many in flight as fit at {MEAN_CONTEXT:.0%} of that length; it sleeps "
            f"while the trainer trains and then keeps {SLEEPING_ENGINE_BYTES / GIB:.1f} GiB (an estimate), and while it "
            "samples the trainer keeps weights, gradients and optimizer state: the larger of the two phases counts"
        )
    return stated
