"""Rotation of queries and keys as one autograd function that saves only the tables for backward.

T tokens, H heads, K head size, R rotated dimensions of K. `model/rope.py` defines the angles.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from phimini.model.config import ModelConfig
from phimini.model.rope import rope_at


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
