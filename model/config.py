"""Shape of a Phi-4-Mini model: one frozen dataclass, the presets, and the floating-point operations that they take.

Letters used through `model/`: B batch, T tokens, D model width, H query heads, G key/value heads,
K head size, F MLP hidden size, V vocabulary, R rotary size (the rotated part of K).

FLOPs follow one convention for every MFU in this project. A multiply-add counts as 2. Counted are every matrix
product of the layers and the head (2 per weight and token; the embedding is a lookup and costs 0), and the two
attention products over the keys that a query sees. Attention is causal within each document, so n tokens see
n (n + 1) / 2 keys. Not counted are norms, rotation, softmax, SwiGLU,
the optimizer, and recomputation that saves memory. Backward is twice forward.
For Phi-4-mini: 7.67 GFLOP per token with the head, and 3.22 GFLOP per token of attention at 16,384 tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor

from phimini.model.checked_fields import Range, check
from phimini.model.suggest import nearest

RopeFactors = Literal["short", "long"]
Width = Annotated[int, Range(1, 2**20)]
Heads = Annotated[int, Range(1, 2**14)]
Positions = Annotated[int, Range(1, 2**31 - 1)]
Positive = Annotated[float, Range(0, 1e15, "(]")]

# microsoft/Phi-4-mini-instruct config.json; entries 0 to 31 are exactly 32.03^(i/31).
PHI4_MINI_LONG_FACTOR = (
    1.0, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649,
    2.446418898, 2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845,
    5.351743533, 5.984965424, 6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158,
    11.70738129, 13.09260651, 14.64173252, 16.37415215, 18.31155283, 20.47818807, 22.90118105,
    25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7, 32.71,
    32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape of a Phi-3-family decoder (`Phi3ForCausalLM`)."""

    num_layers: Annotated[int, Range(1, 1000)]
    model_dim: Width
    """D"""
    num_heads: Heads
    """H, query heads"""
    num_kv_heads: Heads
    """G, key/value heads; H is a multiple of G"""
    head_dim: Heads
    """K"""
    mlp_dim: Width
    """F, the width of gate and of up each"""
    vocab_size: Annotated[int, Range(1, 10**8)]
    max_positions: Positions
    """the longest sequence the long rope table is made for, in tokens"""
    original_max_positions: Positions
    """the length at which Hugging Face and vLLM change from the short to the long table, in tokens"""
    partial_rotary_factor: Annotated[float, Range(0, 1, "(]")] = 0.75
    """share of each head that is rotated; the other dimensions carry no position"""
    rope_theta: Positive = 10000.0
    short_factor: tuple[Positive, ...] | None = None
    """LongRoPE divisors of the R/2 frequencies; None for both factors means plain RoPE"""
    long_factor: tuple[Positive, ...] | None = None
    rope_factors: RopeFactors = "long"
    """the table that this run uses for every token of every batch; stored in checkpoints"""
    norm_eps: Positive = 1e-5
    tie_embeddings: bool = True
    initializer_range: Positive = 0.02

    def __post_init__(self) -> None:
        check(self, "ModelConfig.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"ModelConfig.num_heads: {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"ModelConfig.partial_rotary_factor: {self.partial_rotary_factor} of head_dim {self.head_dim} "
                f"gives {self.rotary_dim} rotated dimensions; expected an even number up to head_dim"
            )
        if (self.short_factor is None) != (self.long_factor is None):
            raise ValueError(
                "ModelConfig: short_factor and long_factor are given together or not at all"
            )
        for name in ("short_factor", "long_factor"):
            factor = getattr(self, name)
            if factor is not None and len(factor) != self.rotary_dim // 2:
                raise ValueError(
                    f"ModelConfig.{name}: expected {self.rotary_dim // 2} values (half of the rotated "
                    f"dimensions), got {len(factor)}"
                )
        if self.long_factor is not None and self.original_max_positions == 1:
            raise ValueError(
                "ModelConfig.original_max_positions: expected at least 2 with LongRoPE, got 1"
            )

    @property
    def rotary_dim(self) -> int:
        """R, the number of rotated dimensions of a head."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def attention_factor(self) -> float:
        """LongRoPE's factor on cos and sin, the same for both tables: sqrt(1 + ln(s) / ln(original_max)).

        s = max_positions / original_max_positions. 1.0 for plain RoPE. Source: LongRoPE, arXiv 2402.13753, as in
        transformers' `_compute_longrope_parameters`.
        """
        if self.long_factor is None or self.max_positions <= self.original_max_positions:
            return 1.0
        scale = self.max_positions / self.original_max_positions
        return math.sqrt(1 + math.log(scale) / math.log(self.original_max_positions))

    @property
    def rope_divisors(self) -> tuple[float, ...]:
        """The R/2 frequency divisors of the run's table; all ones for plain RoPE."""
        factor = self.long_factor if self.rope_factors == "long" else self.short_factor
        return factor if factor is not None else (1.0,) * (self.rotary_dim // 2)

    @property
    def num_parameters(self) -> int:
        """The exact number of parameters; a tied head is counted once."""
        attention = self.model_dim * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        layer = attention + 3 * self.model_dim * self.mlp_dim + 2 * self.model_dim
        embeddings = self.vocab_size * self.model_dim * (1 if self.tie_embeddings else 2)
        return embeddings + self.num_layers * layer + self.model_dim


def _long_factor(num_frequencies: int, largest: float) -> tuple[float, ...]:
    """Return a long table for another head size: a geometric series from 1 to `largest`, like Phi-4-Mini's."""
    return tuple(round(largest ** (i / (num_frequencies - 1)), 9) for i in range(num_frequencies))


PRESETS: dict[str, ModelConfig] = {
    "phi-4-mini": ModelConfig(
        num_layers=32,
        model_dim=3072,
        num_heads=24,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=8192,
        vocab_size=200064,
        max_positions=131072,
        original_max_positions=4096,
        short_factor=(1.0,) * 48,
        long_factor=PHI4_MINI_LONG_FACTOR,
    ),
    # The same vocabulary and head size at a tenth of the weights: for one GPU, or a first cluster run.
    "phi-400m": ModelConfig(
        num_layers=12,
        model_dim=1152,
        num_heads=9,
        num_kv_heads=3,
        head_dim=128,
        mlp_dim=3072,
        vocab_size=200064,
        max_positions=131072,
        original_max_positions=4096,
        short_factor=(1.0,) * 48,
        long_factor=PHI4_MINI_LONG_FACTOR,
    ),
    # Trains in minutes on a CPU, with the features of the full model: grouped heads, partial rotary, a long table
    # that differs from the short one, tied embeddings.
    "tiny": ModelConfig(
        num_layers=4,
        model_dim=128,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        mlp_dim=256,
        vocab_size=256,
        max_positions=512,
        original_max_positions=128,
        short_factor=(1.0,) * 12,
        long_factor=_long_factor(12, 4.0),
        initializer_range=0.06,  # 0.02 learns arithmetic half as fast at this width
    ),
}


def preset(name: str) -> ModelConfig:
    """Return a preset by name. Raises ValueError with the nearest name for an unknown one."""
    if name not in PRESETS:
        raise ValueError(f"unknown model preset {name!r:.60}; {nearest(name, sorted(PRESETS))}")
    return PRESETS[name]


# --- floating-point operations --------------------------------------------------------------------
def layer_flops_per_token(config: ModelConfig) -> int:
    """Return the forward FLOPs of one token in the matrix products of all layers, without attention over keys."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads  # q and o; k and v
    weights = config.model_dim * (heads * config.head_dim + 3 * config.mlp_dim)
    return 2 * config.num_layers * weights


def head_flops_per_token(config: ModelConfig) -> int:
    """Return the forward FLOPs of one row of logits.

    They are counted separately, because rows without loss need no logits.
    """
    return 2 * config.model_dim * config.vocab_size


def attention_flops(config: ModelConfig, cu_seqlens: Sequence[int] | Tensor) -> int:
    """Return the forward FLOPs of scores and weighted values in all layers.

    `cu_seqlens` holds the document starts, then T: [0, ..., T].
    """
    cuts = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens
    lengths = [b - a for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    if len(cuts) < 2 or cuts[0] != 0 or min(lengths) < 0:
        raise ValueError(f"attention_flops: expected cu_seqlens rising from 0, got {list(cuts)}")
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    return 4 * config.num_layers * config.num_heads * config.head_dim * pairs


def forward_flops(
    config: ModelConfig,
    cu_seqlens: Sequence[int] | Tensor,
    num_head_tokens: int | None = None,  # rows with loss; None: all
) -> int:
    """Return the forward FLOPs of one packed batch."""
    num_tokens = int(cu_seqlens[-1])
    num_head_tokens = num_tokens if num_head_tokens is None else num_head_tokens
    return (
        num_tokens * layer_flops_per_token(config)
        + num_head_tokens * head_flops_per_token(config)
        + attention_flops(config, cu_seqlens)
    )


def training_flops(
    config: ModelConfig,
    cu_seqlens: Sequence[int] | Tensor,
    num_head_tokens: int | None = None,
) -> int:
    """Return the FLOPs of forward and backward of one packed batch."""
    return 3 * forward_flops(config, cu_seqlens, num_head_tokens)
