"""LongRoPE on part of each head: frequencies, tables and the rotation.

K head size, R rotary size (the first R of K dimensions are rotated, the others pass through), T tokens.

    angle[p, i] = p / (divisor_i * theta^(2i / R))                            i = 0 .. R/2 - 1
    y[i]        = a * (x[i] * cos(angle_i) - x[i + R/2] * sin(angle_i))
    y[i + R/2]  = a * (x[i + R/2] * cos(angle_i) + x[i] * sin(angle_i))

`a` is the attention factor. It multiplies cos and sin, so only the rotated part of a score grows (by a^2).
The divisors come from `ModelConfig.rope_divisors`: one table for the whole run. Hugging Face chooses the table
by the longest row of each batch, and vLLM by `max_model_len`. A run that mixed them would train one function and
sample from another.
LongRoPE: arXiv 2402.13753; half-split rotation and partial rotary as in transformers' `modeling_phi3.py`.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from phimini.model.config import ModelConfig


def inv_freq(config: ModelConfig, device: torch.device | str | None = None) -> Tensor:
    """Return (R/2,) radians per position in fp32, in the order of operations of transformers and vLLM."""
    exponent = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device=device)
    divisors = torch.tensor(config.rope_divisors, dtype=torch.float32, device=device)
    return 1.0 / (divisors * config.rope_theta ** (exponent / config.rotary_dim))


def rope_at(
    config: ModelConfig, positions: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return (cos, sin) at integer positions of any shape, each (*positions.shape, R/2), with the attention factor.

    The angles are computed in fp32 for every `dtype`, because bf16 cannot represent all integers above 256.
    """
    angles = positions.to(torch.float32)[..., None] * inv_freq(config, positions.device)
    a = config.attention_factor
    return (angles.cos() * a).to(dtype), (angles.sin() * a).to(dtype)


def rope_table(
    config: ModelConfig,
    num_positions: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Return (cos, sin) of positions 0 to num_positions - 1, each (num_positions, R/2), with the attention factor.

    Raises ValueError beyond `config.max_positions`, the longest sequence that the long table is made for.
    """
    if num_positions > config.max_positions:
        raise ValueError(
            f"rope_table: expected at most max_positions = {config.max_positions} positions, got {num_positions}"
        )
    return rope_at(config, torch.arange(num_positions, device=device), dtype)


def apply_rope(
    x: Tensor,  # (..., K)
    cos: Tensor,  # broadcasts against (..., R/2)
    sin: Tensor,
) -> Tensor:
    """Rotate the first R dimensions of each head. For heads (B, T, H, K) pass tables as (T, 1, R/2)."""
    half = cos.shape[-1]
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    rotated = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
    return torch.cat((rotated.to(x.dtype), rest), dim=-1)


# --- packed tokens: one autograd function that saves only the tables for backward (T tokens, H heads) ------
@lru_cache(maxsize=4)
def _table(config: ModelConfig, num_positions: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin of positions 0 to num_positions - 1."""
    cos, sin = rope_at(config, torch.arange(num_positions))
    rest = cos.new_ones(num_positions, config.head_dim - config.rotary_dim)
    return torch.cat((cos, cos, rest), -1)[:, None], sin[:, None]


def rotary_tables(config: ModelConfig, positions_T: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Return (scale_T1K, sin_T1R2) in fp32 of positions below `longest`.

    scale multiplies each dimension: [cos, cos, 1 for the dimensions that are not rotated]. sin multiplies the other
    dimension of its pair. The attention factor is in cos and sin.
    """
    # Rows of a cached table: computing sine and cosine for every token would take a tenth of a small step.
    scale, sin = _table(config, 1 << (longest - 1).bit_length())
    return scale[positions_T], sin[positions_T]


def rotate(x_THK: Tensor, scale_T1K: Tensor, sin_T1R2: Tensor, sign: int) -> Tensor:
    """Rotate by +angle (sign 1) or by its transpose (sign -1). Products are in fp32, with one rounding for bf16."""
    half = sin_T1R2.shape[-1]
    y_THK = x_THK * scale_T1K
    y_THK[..., :half].addcmul_(x_THK[..., half : 2 * half], sin_T1R2, value=-sign)
    y_THK[..., half : 2 * half].addcmul_(x_THK[..., :half], sin_T1R2, value=sign)
    return y_THK.to(x_THK.dtype)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THK: Tensor, scale_T1K: Tensor, sin_T1R2: Tensor) -> Tensor:
        ctx.save_for_backward(scale_T1K, sin_T1R2)
        return rotate(x_THK, scale_T1K, sin_T1R2, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        scale_T1K, sin_T1R2 = ctx.saved_tensors
        return rotate(grads[0], scale_T1K, sin_T1R2, -1), None, None


def apply_rotary(x_THK: Tensor, scale_T1K: Tensor, sin_T1R2: Tensor) -> Tensor:
    """Rotate the first R dimensions of each head by its token's angle. Tables are from `rotary_tables`, in fp32."""
    return _Rotary.apply(x_THK, scale_T1K, sin_T1R2)  # pyright: ignore[reportReturnType]
