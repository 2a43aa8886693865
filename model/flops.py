"""Floating-point operations of the model, by one convention, so that MFU means the same everywhere.

Counted: a multiply-add is 2. Every matrix product of the layers and the head (2 per weight and token; the
embedding is a lookup and costs none), and the two attention products over the keys that a query really sees:
document by document, causal, so n tokens see n (n + 1) / 2 keys. Not counted: norms, rotation, softmax, SwiGLU,
the optimizer, and whatever is computed a second time to save memory. Backward is twice forward.
For Phi-4-mini: 7.67 GFLOP per token with the head, and 3.22 GFLOP per token of attention at 16,384 tokens.

D model width, H query heads, G key/value heads, K head size, F MLP width, V vocabulary.
"""

from collections.abc import Sequence

from torch import Tensor

from phimini.model.config import ModelConfig


def layer_flops_per_token(config: ModelConfig) -> int:
    """Forward FLOPs of one token in all layers' matrix products, attention over keys left out."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads  # q and o; k and v
    weights = config.model_dim * (heads * config.head_dim + 3 * config.mlp_dim)
    return 2 * config.num_layers * weights


def head_flops_per_token(config: ModelConfig) -> int:
    """Forward FLOPs of one row of logits. Rows without loss need not be computed, so they are counted apart."""
    return 2 * config.model_dim * config.vocab_size


def attention_flops(config: ModelConfig, cu_seqlens: Sequence[int] | Tensor) -> int:
    """Forward FLOPs of scores and weighted values in all layers; cu_seqlens: [0, ..., T], document starts."""
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
    """Of one packed batch."""
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
    """Forward and backward of one packed batch."""
    return 3 * forward_flops(config, cu_seqlens, num_head_tokens)
