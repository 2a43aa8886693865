"""Floating-point operations of the model, by one convention for every MFU in this project.

A multiply-add counts as 2. Counted are every matrix product of the layers and the head (2 per weight and token; the
embedding is a lookup and costs 0), and the two attention products over the keys that a query sees. Attention is
causal within each document, so n tokens see n (n + 1) / 2 keys. Not counted are norms, rotation, softmax, SwiGLU,
the optimizer, and recomputation that saves memory. Backward is twice forward.
For Phi-4-mini: 7.67 GFLOP per token with the head, and 3.22 GFLOP per token of attention at 16,384 tokens.

D model width, H query heads, G key/value heads, K head size, F MLP width, V vocabulary.
"""

from collections.abc import Sequence

from torch import Tensor

from phimini.model.config import ModelConfig


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
