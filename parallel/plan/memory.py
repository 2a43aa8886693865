"""Bytes that one GPU holds during a training step at a layout, part by part, by arithmetic alone.

Letters: D model width, H query heads, G key/value heads, K head size, F MLP hidden size, V vocabulary.
The bytes are those of the pipeline stage with the largest sum. A rollout engine on the same GPU sleeps while the trainer
trains, and allocates its memory once activations and the head have freed theirs, so there are two phases with a sum each.
"""

import math
from dataclasses import dataclass
from typing import Literal

from phimini.kernels.head.rows import CHUNK_BYTES
from phimini.model.config import ModelConfig
from phimini.parallel.megatron.weight_names import LAYER_NAMES, hf_names
from phimini.parallel.ranks.layout import Layout

Recompute = Literal["none", "selective", "full"]
Fp8 = Literal["none", "auto", "tensorwise", "blockwise", "mxfp8"]
GIB = 2**30
# Estimates that were not measured; `plan` lists them among its assumptions.
NCCL_BYTES_PER_GROUP = int(0.35 * GIB)
CUDA_BYTES = int(1.2 * GIB)
SLEEPING_ENGINE_BYTES = int(1.0 * GIB)
_ONLY_WHILE_TRAINING = ("activations", "head")
_SPLIT_OF = {hf: split for hf, split in LAYER_NAMES.values()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU model."""

    name: str
    memory_bytes: int
    """bytes that torch may allocate in all"""
    peak_flops: float
    """dense bf16 FLOP/s; also the base of MFU in fp8 runs"""
    bandwidth: float
    """bytes/s of the memory, by its data sheet"""
    capability: tuple[int, int]
    """CUDA's compute capability, which decides the FP8 recipes"""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="a100",
            memory_bytes=int(79.1 * GIB),
            peak_flops=312e12,
            bandwidth=2.04e12,
            capability=(8, 0),
        ),
        Gpu(
            name="h100",
            memory_bytes=int(79.1 * GIB),
            peak_flops=989e12,
            bandwidth=3.35e12,
            capability=(9, 0),
        ),
        Gpu(
            name="h200",
            memory_bytes=int(139.8 * GIB),
            peak_flops=989e12,
            bandwidth=4.8e12,
            capability=(9, 0),
        ),
        Gpu(
            name="b200",
            memory_bytes=int(178.3 * GIB),
            peak_flops=2250e12,
            bandwidth=8e12,
            capability=(10, 0),
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryOptions:
    """Settings besides model, layout and tokens that change the memory of a step."""

    recompute: Recompute = "none"
    """recomputed in backward: `selective`: norm outputs and the SwiGLU product; `full`: whole layers"""
    zero1: bool = True
    """optimizer state divided over the data and context ranks"""
    fp8: Fp8 = "none"
    """FP8 recipe of the linears in the layers"""
    element_bytes: int = 2
    """bytes of a weight or activation: 2 for bf16 (with fp32 masters), 4 for fp32 (without)"""
    reference_model: bool = False
    """a second, frozen copy of the weights (DPO)"""
    pair_scratches: int = 0
    """fp32 gradients of the head that a pair longer than a chunk keeps until its coefficient is known (DPO)"""
    rollout_sequences: int = 0
    """sequences in flight, at full length, of a rollout engine on the same GPU; 0: no engine here"""
    rollout_tensor_parallel: int = 1
    """GPUs that share that engine's weights, keys and values"""


def stage_layers(config: ModelConfig, layout: Layout) -> list[int]:
    """Return the number of layers of each pipeline stage, over its virtual chunks."""
    chunks = layout.layers_of_chunks(config)
    return [sum(chunks[stage :: layout.pipeline]) for stage in range(layout.pipeline)]


def stage_parameters(config: ModelConfig, layout: Layout) -> list[int]:
    """Return the parameters on one rank of each pipeline stage, with a tied head's copy on the last stage."""
    layer = 0
    for name, shape in hf_names(config).items():
        if name.startswith("model.layers.0."):
            whole = _SPLIT_OF[name.removeprefix("model.layers.0.")] == "whole"
            layer += math.prod(shape) // (1 if whole else layout.tensor)
    per_stage = [layer * layers for layers in stage_layers(config, layout)]
    vocabulary = config.vocab_size * config.model_dim // layout.tensor
    per_stage[0] += vocabulary
    per_stage[-1] += config.model_dim  # the final norm
    if layout.pipeline > 1 or not config.tie_embeddings:
        per_stage[-1] += vocabulary
    return per_stage


def activation_elements(config: ModelConfig, layout: Layout) -> dict[str, float]:
    """Return the elements that one layer keeps for backward, per token of a rank's share (tokens / context)."""
    D, H, G = config.model_dim, config.num_heads, config.num_kv_heads
    K, F = config.head_dim, config.mlp_dim
    tp = layout.tensor
    residual_split = tp if layout.sequence_parallel else 1
    # A linear's input is gathered for its product, but only this rank's part is kept.
    elements = {
        "norm inputs": 2 * D / residual_split,
        "norm outputs": 2 * D / residual_split,
        "q": H * K / tp,
        "attention out": H * K / tp,
        "gate and up": 2 * F / tp,
        "swiglu out": F / tp,
    }
    if layout.uses_ring("cuda"):
        elements["own k, v"] = 2 * G * K / tp
    elif layout.context > 1:
        elements["gathered k, v"] = 2 * G * K * layout.context / tp
    else:
        elements["k, v"] = 2 * G * K / tp
    return elements


def memory_bytes(
    config: ModelConfig,
    layout: Layout,
    options: MemoryOptions,
    *,
    tokens: int,
    sequence_length: int,
    num_microbatches: int,
) -> dict[str, dict[str, int]]:
    """Return bytes by phase (`training`, and `rollout` if an engine shares the GPU) and part, on each phase's fullest rank.

    `layout.data` must be filled in.
    tokens: tokens of one micro-batch, before context parallelism divides them.
    sequence_length: tokens of the longest sequence, for a rollout engine's keys and values.
    """
    stages = [
        _stage_bytes(config, layout, options, stage, tokens, num_microbatches)
        for stage in range(layout.pipeline)
    ]
    phases = {"training": _fullest(stages)}
    if options.rollout_sequences:
        engine = _engine_bytes(config, options, sequence_length)
        phases["rollout"] = _fullest(
            [stage | dict.fromkeys(_ONLY_WHILE_TRAINING, 0) | engine for stage in stages]
        )
    return phases


def _fullest(stages: list[dict[str, int]]) -> dict[str, int]:
    return max(stages, key=lambda parts: sum(parts.values()))


def _engine_bytes(
    config: ModelConfig, options: MemoryOptions, sequence_length: int
) -> dict[str, int]:
    """Return bf16 weights, keys and values on one of the engine's GPUs, which divide heads but not norms."""
    size = options.rollout_tensor_parallel
    kv_heads = -(-config.num_kv_heads // size)  # copied if there are more GPUs than heads
    kv_bytes_per_token = 2 * 2 * config.num_layers * kv_heads * config.head_dim
    return {
        "rollout_weights": 2 * stage_parameters(config, Layout(tensor=size))[0],
        "rollout_kv": options.rollout_sequences * sequence_length * kv_bytes_per_token,
    }


def decode_bytes_per_token(config: ModelConfig, sequences: int, sequence_length: int) -> float:
    """Return the bytes that sampling a token reads: its share of the weights, and half a sequence's keys and values.

    sequences: decoded together, each of up to `sequence_length` tokens.
    """
    engine = _engine_bytes(config, MemoryOptions(rollout_sequences=sequences), sequence_length)
    return (engine["rollout_weights"] + engine["rollout_kv"] / 2) / sequences


def _stage_bytes(
    config: ModelConfig,
    layout: Layout,
    options: MemoryOptions,
    stage: int,
    tokens: int,
    num_microbatches: int,
) -> dict[str, int]:
    assert layout.data is not None, "a resolved layout"
    parameters = stage_parameters(config, layout)[stage]
    replicas = layout.data * layout.context
    is_last = stage == layout.pipeline - 1
    size = options.element_bytes
    head = _head_bytes(config, layout, options, tokens) if is_last else 0
    state_per_parameter = 8 if size == 4 else 12  # AdamW's moments, and masters unless fp32
    groups = (layout.tensor, layout.pipeline, layout.context, replicas)
    parts = {
        "weights": size * parameters,
        "gradients": 4 * parameters,
        "optimizer": state_per_parameter * parameters // (replicas if options.zero1 else 1),
        "activations": _activation_bytes(
            config, layout, options, stage, tokens, num_microbatches, head
        ),
        "head": head,
        "fp8_copies": 0,
        "reference_model": size * parameters if options.reference_model else 0,
        "nccl": NCCL_BYTES_PER_GROUP * sum(n > 1 for n in groups),
        "cuda": CUDA_BYTES,
        "rollout_residue": SLEEPING_ENGINE_BYTES if options.rollout_sequences else 0,
        "rollout_weights": 0,
        "rollout_kv": 0,
    }
    if options.fp8 != "none":
        # Rowwise and columnwise copies for the forward and the transposed GEMM, one byte each.
        vocabulary = config.vocab_size * config.model_dim // layout.tensor
        num_vocabularies = (stage == 0) + (
            is_last and (layout.pipeline > 1 or not config.tie_embeddings)
        )
        parts["fp8_copies"] = 2 * (parameters - num_vocabularies * vocabulary)
    return parts


def layer_bytes_per_token(
    config: ModelConfig, layout: Layout, options: MemoryOptions
) -> tuple[float, float]:
    """Return (bytes that each layer keeps until its backward, working bytes of one layer's backward), per token of a rank."""
    elements = activation_elements(config, layout)
    lse_bytes = 4 * config.num_heads / layout.tensor
    whole_layer = options.element_bytes * sum(elements.values()) + lse_bytes
    kept, working = whole_layer, 0.0
    if options.recompute == "selective":
        made_again = elements["norm outputs"] + elements["swiglu out"]
        kept = whole_layer - options.element_bytes * made_again
        # One tensor at a time: its linear recomputes it, uses it and frees it.
        working = options.element_bytes * max(elements["norm outputs"] / 2, elements["swiglu out"])
    elif options.recompute == "full":
        kept = options.element_bytes * elements["norm inputs"] / 2
        working = whole_layer
    if layout.uses_ring("cuda"):
        working += _ring_bytes(config, options.element_bytes) / layout.tensor
    return kept, working


def _activation_bytes(
    config: ModelConfig,
    layout: Layout,
    options: MemoryOptions,
    stage: int,
    tokens: int,
    num_microbatches: int,
    head_bytes: int,
) -> int:
    """Return what the layers keep, and of a layer's backward what exceeds the head, which is gone by then."""
    kept, working = layer_bytes_per_token(config, layout, options)
    layers = stage_layers(config, layout)[stage]
    in_flight = _micro_batches_in_flight(layout, stage, num_microbatches)
    rows = tokens / layout.context
    return math.ceil(rows * kept * layers * in_flight + max(0, rows * working - head_bytes))


def _ring_bytes(config: ModelConfig, element_bytes: int) -> float:
    """Return the bytes of one layer's backward per token: two ranks' keys and values, two gradient sums, dq in fp32."""
    kv = 2 * config.num_kv_heads * config.head_dim
    return 2 * kv * element_bytes + 2 * kv * 4 + config.num_heads * config.head_dim * 4


def _micro_batches_in_flight(layout: Layout, stage: int, num_microbatches: int) -> float:
    """Return the number of micro-batches whose activations a stage holds at once, in 1F1B or interleaved (arXiv 2104.04473)."""
    if layout.pipeline == 1:
        return 1
    if layout.virtual_pipeline == 1:
        return min(num_microbatches, layout.pipeline - stage)
    warm_up = 2 * (layout.pipeline - stage - 1) + (layout.virtual_pipeline - 1) * layout.pipeline
    chunks = min(num_microbatches * layout.virtual_pipeline, warm_up + 1)
    return chunks / layout.virtual_pipeline


def _head_bytes(config: ModelConfig, layout: Layout, options: MemoryOptions, tokens: int) -> int:
    """Return the bytes of one chunk of logits, and of four tensors of hidden states and two fp32 gradients of them.

    The four: the final norm's input and output, its rows that count, and their gradient. The two: dX of the rows that
    count, and of all rows. dW is not among them: it is added to the gradients of the weights.
    """
    rows = tokens // layout.context
    hidden = rows * config.model_dim * (4 * options.element_bytes + 2 * 4)
    vocabulary = config.vocab_size // layout.tensor
    logits = rows * vocabulary * options.element_bytes
    scratches = options.pair_scratches if logits > CHUNK_BYTES["cuda"] else 0
    return hidden + min(CHUNK_BYTES["cuda"], logits) + scratches * 4 * vocabulary * config.model_dim
