"""Predicted time of a training step: FLOPs and bytes of its operations, counted by arithmetic, over the rates of `rates.py`.

Letters as in memory.py. The counts are those of one rank and one micro-batch; a test compares them with the launches of a
traced step. Left out: the host's time (which exceeds the GPU's below about 4,000 tokens a rank), sends between pipeline
stages, and each kernel's own inefficiency at small shapes.
"""

from dataclasses import dataclass, fields

from phimini.model.config import (
    ModelConfig,
    attention_flops,
    head_flops_per_token,
    layer_flops_per_token,
)
from phimini.parallel.plan.memory import Recompute, fp8_layers, stage_layers, stage_parameters
from phimini.parallel.plan.rates import LAUNCH_S, Attention, Gpu, rate
from phimini.parallel.plan.workload import Workload
from phimini.parallel.ranks.layout import Layout

GPUS_PER_NODE = 8


@dataclass(frozen=True, slots=True)
class Counts:
    """FLOPs and bytes of kernels, by the rate that bounds them."""

    gemm: float = 0.0
    gemm_fp8: float = 0.0
    head_logits: float = 0.0
    head_gradients: float = 0.0
    attention_forward: float = 0.0
    attention_backward: float = 0.0
    bytes: float = 0.0
    """of kernels that memory bounds: all but products and attention"""

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, factor: float) -> "Counts":
        return Counts(*(getattr(self, f.name) * factor for f in fields(self)))

    def seconds(self, gpu: Gpu, attention: Attention | None = None, fp8: str = "none") -> float:
        """Return the time of these kernels one after the other."""
        kernel = attention or gpu.attention
        names = {
            "attention_forward": f"{kernel}_forward", "attention_backward": f"{kernel}_backward",
            "gemm_fp8": "gemm_blockwise" if fp8 == "blockwise" else "gemm_tensorwise",
        }  # fmt: skip
        counted = {f.name: getattr(self, f.name) for f in fields(self)}
        return sum(n / rate(names.get(name, name), gpu) for name, n in counted.items() if n)


# --- counts --------------------------------------------------------------------------------------
def layer_counts(
    config: ModelConfig, layout: Layout, recompute: Recompute, rows: float, document: int, *, backward: bool = True,
    fp8: bool = False,
) -> Counts:  # fmt: skip
    """Return the counts of one layer's forward and, unless it is a forward alone, backward.

    rows: tokens of this rank. document: length of the documents in them. fp8: norms are inside the linears, which keep
    their outputs. The bytes of rounding to FP8 are not counted.
    """
    D, K, F, tp = config.model_dim, config.head_dim, config.mlp_dim, layout.tensor
    split = tp if layout.sequence_parallel else 1
    heads, qkv = config.num_heads * K / tp, (config.num_heads + 2 * config.num_kv_heads) * K / tp
    products = rows * layer_flops_per_token(config) / config.num_layers / tp
    scores = rows * attention_flops(config, [0, document]) / document / config.num_layers / tp
    # Two norms with the residual's add; SwiGLU; rotation. Each reads and writes bf16.
    # A layer that is recomputed whole leaves no add to the next one's norm.
    norms, swiglu, rope = (9 if recompute == "full" else 8) * D / split, 3 * F / tp, 2 * qkv
    again = {
        "none": 0.0,
        "selective": (not fp8) * 4 * D / split + swiglu,
        "full": norms + swiglu + rope,
    }
    elements = norms + swiglu + rope
    if backward:
        elements += norms + 5 * F / tp + rope + again[recompute]
    moved = 2 * elements
    if layout.uses_ring("cuda"):
        # Each later hop sees half of its block's queries or keys. Sums are fp32: out and dq of a rank, dk and dv.
        hops = 1 + 0.5 * (layout.context - 1)
        sums = 2 * config.num_kv_heads * K / tp
        moved += hops * (26 * heads + (10 * heads + 10 * sums if backward else 0))
    forwards = 1 + (recompute == "full") * backward
    return Counts(
        gemm=products * (forwards + 2 * backward),
        attention_forward=scores * forwards,
        attention_backward=2.5 * scores * backward,
        bytes=rows * moved,
    )


def outer_counts(
    config: ModelConfig, layout: Layout, rows: float, trained: float, scratches: int = 0
) -> Counts:
    """Return the counts of embedding and head, forward and backward; `trained` rows have a loss."""
    tp = layout.tensor
    products = trained * head_flops_per_token(config) / tp
    weights = config.vocab_size * config.model_dim / tp
    moved = (
        # The gradient replaces the logits; rows that count are taken out of all and put back.
        trained * (4 * config.vocab_size / tp + 2 * 16 * config.model_dim)
        + 2 * 16 * rows * config.model_dim  # embedding, final norm and add, both directions
        + 12 * weights  # the embedding's gradient: written in bf16, added to fp32
        + scratches * 24 * weights  # of pairs: zeroed, scaled, added
        + bool(scratches)
        * 12
        * rows
        * config.model_dim  # and their rows' gradients, scaled in fp32
    )
    return Counts(head_logits=products, head_gradients=2 * products, bytes=moved)


def forward_head(config: ModelConfig, layout: Layout, rows: float) -> Counts:
    """Return the counts of log-probs alone."""
    return Counts(head_logits=rows * head_flops_per_token(config) / layout.tensor)


# --- a step --------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Predicted seconds of a step and where they go."""

    micro_batches: float
    """kernels of all micro-batches, with the pipeline's bubble"""
    links: float
    """exposed transfers between GPUs, which do not overlap with kernels"""
    optimizer: float

    @property
    def total(self) -> float:
        return self.micro_batches + self.links + self.optimizer


def predict(
    config: ModelConfig, workload: Workload, gpu: Gpu, layout: Layout, recompute: Recompute, num_microbatches: int
) -> StepTime:  # fmt: skip
    """Return the predicted time of a step of a `Workload`; `layout.data` must be filled in."""
    assert layout.data is not None, "a resolved layout"
    rows = workload.micro_rows * workload.sequence_length / layout.context
    document = min(workload.document_length or workload.sequence_length, workload.sequence_length)
    stages = []
    for stage, layers in enumerate(stage_layers(config, layout)):
        fp8 = workload.fp8 != "none"
        counts = layer_counts(config, layout, recompute, rows, document, fp8=fp8) * layers
        counts += (
            layer_counts(config, layout, recompute, rows, document, backward=False)
            * (workload.extra_forwards * layers)
        )  # fmt: skip
        if stage == layout.pipeline - 1:
            trained = workload.trained_share * rows
            counts += outer_counts(config, layout, rows, trained, workload.pair_scratches)
            counts += forward_head(config, layout, trained) * workload.extra_forwards
        if fp8:
            rounded = counts.gemm * fp8_layers(config, layout, stage) / layers
            counts += Counts(gemm=-rounded, gemm_fp8=rounded)
        recipe = "blockwise" if workload.fp8 == "blockwise" else "tensorwise"
        exposed = layers * _layer_transfers(config, layout, recompute, rows, gpu, counts, layers)
        stages.append((counts.seconds(gpu, fp8=recipe), exposed))
    slowest, links = max(stages, key=sum)
    places = num_microbatches + (layout.pipeline - 1) / layout.virtual_pipeline
    optimizer, reduction = _per_step(config, workload, gpu, layout)
    if workload.overlap:  # behind the last micro-batch's backward and the first one's forward
        reduction = max(0.0, reduction - slowest)
    return StepTime(
        micro_batches=places * (slowest + LAUNCH_S),
        links=places * links + reduction,
        optimizer=optimizer,
    )


def _layer_transfers(
    config: ModelConfig, layout: Layout, recompute: Recompute, rows: float, gpu: Gpu, counts: Counts, layers: int
) -> float:  # fmt: skip
    """Return a layer's seconds of transfers that its computation does not hide."""
    seconds = 0.0
    tp, D = layout.tensor, config.model_dim
    if tp > 1:
        # Gathers and scatters of a sequence-parallel layer: 4 forward, 6 backward. An all-reduce is one of each.
        times = (10 if layout.sequence_parallel else 8) + 4 * (recompute == "full")
        seconds += times * rows * D * 2 * (tp - 1) / tp / rate("link", gpu)
    if layout.uses_ring("cuda"):
        link = "link" if layout.context * tp <= GPUS_PER_NODE else "network"
        pairs = 2 * config.num_kv_heads * config.head_dim / tp
        hops = layout.context - 1
        sent = (
            rows * pairs * (2 * 2 * hops + 4 * (hops + 1))
        )  # keys twice in bf16, their gradients in fp32
        attention = Counts(
            attention_forward=counts.attention_forward / layers,
            attention_backward=counts.attention_backward / layers,
        ).seconds(gpu)
        seconds += max(0.0, sent / rate(link, gpu) - attention * hops / (hops + 1))
    return seconds


def _per_step(
    config: ModelConfig, workload: Workload, gpu: Gpu, layout: Layout
) -> tuple[float, float]:
    """Return seconds of the optimizer, and of the reduction of gradients and the gather of parameters."""
    assert layout.data is not None, "a resolved layout"
    parameters = max(stage_parameters(config, layout))
    replicas = layout.data * layout.context
    shards = replicas if workload.zero1 else 1
    # Gradients: zeroed, scaled. Of a shard: norm and clip, then gradient, master and two moments read and written.
    moved = parameters * (4 + 8 + (4 + 8 + 30) / shards)
    speed = rate("link", gpu)
    if layout.data * layout.model_size > GPUS_PER_NODE:
        # A ring enters and leaves a node once, over the adapters of all its GPUs there.
        there = max(1, GPUS_PER_NODE // (layout.tensor * layout.pipeline))
        speed = min(speed, there * rate("network"))
    # fp32 gradients scattered and bf16 parameters gathered, or gradients all-reduced.
    sent = parameters * (4 + 2 if workload.zero1 else 8) * (replicas - 1) / replicas
    return moved / rate("bytes", gpu), sent / speed
