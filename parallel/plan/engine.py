"""A rollout engine's memory: bytes of weights and of a token's keys and values, and the sequences that a GPU holds."""

from dataclasses import dataclass

from phimini.model.config import ModelConfig
from phimini.parallel.plan.rates import GIB, RESERVE

ENGINE_BYTES = int(2.0 * GIB)
"""estimate: activations, CUDA graphs and buffers of an engine that is awake"""
SLEEPING_ENGINE_BYTES = int(1.0 * GIB)
"""estimate: memory that a sleeping engine keeps"""
MEAN_CONTEXT = 0.25
"""assumed mean length of the sequences in flight, of the longest one's: answers half as long as allowed, half done. The
engine pages its memory: where sequences grow longer together, it puts some back and computes them again later"""
MOST_SEQUENCES = 256
"""sequences in flight where memory holds more of them"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """Settings of a rollout engine that decide its memory."""

    longest: int
    """tokens of the longest sequence; the engine refuses to start without memory for one"""
    tensor_parallel: int = 1
    """GPUs that share weights, keys and values"""
    max_batch: int | None = None
    """sequences in flight; None: as many as memory holds, up to MOST_SEQUENCES"""
    memory_share: float | None = None
    """share of the GPU's memory for the engine; None: all that the trainer leaves free"""
    fp8_cache: bool = False
    """keys and values of one byte instead of two"""

    def __post_init__(self) -> None:
        if self.tensor_parallel < 1:
            raise ValueError(
                f"Engine.tensor_parallel: expected at least 1, got {self.tensor_parallel}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMemory:
    """Memory of an engine on each of its GPUs."""

    weights: int
    kv: int
    """bytes of the pool of keys and values"""
    sequences: int
    """in flight, that the pool holds"""
    share: float
    """of the GPU's memory"""


def kv_bytes_per_token(config: ModelConfig, engine: Engine) -> int:
    """Return the bytes of a token's keys and values on one of the engine's GPUs."""
    heads = -(
        -config.num_kv_heads // engine.tensor_parallel
    )  # copied if there are more GPUs than heads
    return 2 * config.num_layers * heads * config.head_dim * (1 if engine.fp8_cache else 2)


def weight_bytes(config: ModelConfig, engine: Engine) -> int:
    """Return the bytes of bf16 weights on one of the engine's GPUs, which divide all but norms."""
    norms = (2 * config.num_layers + 1) * config.model_dim
    return 2 * ((config.num_parameters - norms) // engine.tensor_parallel + norms)


def engine_memory(
    config: ModelConfig, engine: Engine, gpu_bytes: int, held_bytes: int
) -> EngineMemory:
    """Return what an engine gets on a GPU of `gpu_bytes` where the trainer holds `held_bytes` while it samples.

    The pool has room for one of the longest sequences even where that is more than there is: such a plan does not fit.
    """
    weights, per_token = weight_bytes(config, engine), kv_bytes_per_token(config, engine)
    free = (1 - RESERVE) * gpu_bytes - held_bytes
    if engine.memory_share is not None:
        free = engine.memory_share * gpu_bytes
    pool = max(int(free) - weights - ENGINE_BYTES, per_token * engine.longest)
    sequences = max(1, int(pool / (per_token * MEAN_CONTEXT * engine.longest)))
    return EngineMemory(
        weights=weights,
        kv=pool,
        sequences=min(sequences, MOST_SEQUENCES),
        share=(weights + ENGINE_BYTES + pool) / gpu_bytes,
    )


def decode_bytes_per_token(
    config: ModelConfig, engine: Engine, sequences: int, sequence_length: int
) -> float:
    """Return the bytes that sampling a token reads: its share of the weights, and half a sequence's keys and values.

    sequences: decoded together, each of up to `sequence_length` tokens.
    """
    kv = kv_bytes_per_token(config, engine) * sequence_length / 2
    return weight_bytes(config, engine) / sequences + kv
