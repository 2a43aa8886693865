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
from phimini.parallel.megatron.fp8 import is_fp8_layer
from phimini.parallel.megatron.weight_names import LAYER_NAMES, hf_names
from phimini.parallel.plan.engine import (
    ENGINE_BYTES,
    SLEEPING_ENGINE_BYTES,
    Engine,
    engine_memory,
)
from phimini.parallel.plan.rates import GIB
from phimini.parallel.ranks.layout import Layout

Recompute = Literal["none", "selective", "full"]
Fp8 = Literal["none", "auto", "tensorwise", "blockwise", "mxfp8"]
# Estimates that were not measured; `plan` lists them among its assumptions.
NCCL_BYTES_PER_GROUP = int(0.35 * GIB)
CUDA_BYTES = int(1.2 * GIB)
_ONLY_WHILE_TRAINING = ("activations", "head", "rollout_residue")
_ENGINE_PARTS = ("rollout_weights", "rollout_working", "rollout_kv")
_SPLIT_OF = {hf: split for hf, split in LAYER_NAMES.values()}


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
    engine: Engine | None = None
    """rollout engine on the same GPUs; None: no engine here"""


def stage_layers(config: ModelConfig, layout: Layout) -> list[int]:
    """Return the number of layers of each pipeline stage, over its virtual chunks."""
    chunks = layout.layers_of_chunks(config)
    return [sum(chunks[stage :: layout.pipeline]) for stage in range(layout.pipeline)]


def layer_parameters(config: ModelConfig, layout: Layout) -> int:
    """Return the parameters of one layer on one rank."""
    layer = 0
    for name, shape in hf_names(config).items():
        if name.startswith("model.layers.0."):
            whole = _SPLIT_OF[name.removeprefix("model.layers.0.")] == "whole"
            layer += math.prod(shape) // (1 if whole else layout.tensor)
    return layer


def fp8_layers(config: ModelConfig, layout: Layout, stage: int) -> int:
    """Return how many of a stage's layers compute in FP8: all but the model's first and last."""
    layers = stage_layers(config, layout)
    first = sum(layers[:stage])
    return sum(is_fp8_layer(first + i, config.num_layers) for i in range(layers[stage]))


def stage_parameters(config: ModelConfig, layout: Layout) -> list[int]:
    """Return the parameters on one rank of each pipeline stage, with a tied head's copy on the last stage."""
    layer = layer_parameters(config, layout)
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
    num_microbatches: int,
    gpu_bytes: int = 0,
) -> dict[str, dict[str, int]]:
    """Return bytes by phase (`training`, and `rollout` if an engine shares the GPU) and part, on each phase's fullest rank.

    `layout.data` must be filled in.
    tokens: tokens of one micro-batch, before context parallelism divides them.
    gpu_bytes: memory of the GPU, which an engine takes its keys and values from.
    """
    stages = [
        _stage_bytes(config, layout, options, stage, tokens, num_microbatches)
        for stage in range(layout.pipeline)
    ]
    phases = {"training": _fullest(stages)}
    if options.engine is not None:
        held = _fullest([stage | dict.fromkeys(_ONLY_WHILE_TRAINING, 0) for stage in stages])
        memory = engine_memory(config, options.engine, gpu_bytes, sum(held.values()))
        phases["rollout"] = held | {
            "rollout_weights": memory.weights,
            "rollout_working": ENGINE_BYTES,
            "rollout_kv": memory.kv,
        }
    return phases


def held_while_sampling(phases: dict[str, dict[str, int]]) -> int:
    """Return the bytes of the trainer beside an awake engine."""
    return sum(size for name, size in phases["rollout"].items() if name not in _ENGINE_PARTS)


def _fullest(stages: list[dict[str, int]]) -> dict[str, int]:
    return max(stages, key=lambda parts: sum(parts.values()))


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
        "rollout_residue": SLEEPING_ENGINE_BYTES if options.engine is not None else 0,
    } | dict.fromkeys(_ENGINE_PARTS, 0)
    if options.fp8 != "none":
        # Each linear has a copy for the forward and a transposed one for the backward, of one byte. Where the weights
        # themselves are in FP8 (ZeRO-1, not mxfp8), the first of them is the weight.
        middle = fp8_layers(config, layout, stage) * layer_parameters(config, layout)
        kept = options.zero1 and options.fp8 != "mxfp8"
        parts["weights"] -= middle if kept else 0
        parts["fp8_copies"] = middle if kept else 2 * middle
    return parts


def layer_bytes_per_token(
    config: ModelConfig, layout: Layout, options: MemoryOptions, *, in_fp8: bool = False
) -> tuple[float, float]:
    """Return (bytes that each layer keeps until its backward, working bytes of one layer's backward), per token of a rank.

    in_fp8: for a layer whose linears keep their inputs in FP8, by Transformer Engine's source; not traced.
    """
    elements = activation_elements(config, layout)
    size = options.element_bytes
    whole_layer = size * sum(elements.values()) + 4 * config.num_heads / layout.tensor
    if in_fp8:
        # One byte in place of two, and one more of attention's output, which attention keeps itself.
        rounded = elements["norm outputs"] + elements["swiglu out"]
        whole_layer += elements["attention out"] - (size - 1) * rounded
    kept, working = whole_layer, 0.0
    if options.recompute == "selective":
        # One tensor at a time: its linear recomputes it, uses it and frees it.
        working = size * max(elements["norm outputs"] / 2, elements["swiglu out"])
        if options.fp8 == "none":
            kept -= size * (elements["norm outputs"] + elements["swiglu out"])
        else:  # a norm is inside its linear, which keeps its output
            kept -= (1 if in_fp8 else size) * elements["swiglu out"]
            kept -= (
                in_fp8 * elements["attention out"]
            )  # the linear after it saves no copy of its own
    elif options.recompute == "full":
        kept = size * elements["norm inputs"] / 2
        working = whole_layer
    if layout.uses_ring("cuda"):
        working += _ring_bytes(config, size) / layout.tensor
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
    plain, working = layer_bytes_per_token(config, layout, options)
    middle = fp8_layers(config, layout, stage) if options.fp8 != "none" else 0
    rounded, _ = layer_bytes_per_token(config, layout, options, in_fp8=True)
    kept = middle * rounded + (stage_layers(config, layout)[stage] - middle) * plain
    in_flight = _micro_batches_in_flight(layout, stage, num_microbatches)
    rows = tokens / layout.context
    return math.ceil(rows * kept * in_flight + max(0, rows * working - head_bytes))


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
