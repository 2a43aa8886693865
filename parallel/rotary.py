"""The rotation of queries and keys as one autograd function: nothing but the tables is kept for backward.

T tokens, H heads, K head size, R rotated dimensions of K. `model/rope.py` defines the angles.
"""

from typing import Any

import torch
from torch import Tensor

from phimini.model.config import ModelConfig
from phimini.model.rope import rope_at


def rotary_tables(config: ModelConfig, positions_T: Tensor) -> tuple[Tensor, Tensor]:
    """(scale_T1K, sin_T1R2): what multiplies each dimension in place, and what multiplies its partner.

    scale is [cos, cos, 1 for the dimensions that are not rotated]; the attention factor is in cos and sin.
    """
    cos, sin = rope_at(config, positions_T)
    rest = cos.new_ones(cos.shape[0], config.head_dim - config.rotary_dim)
    return torch.cat((cos, cos, rest), -1)[:, None], sin[:, None]


def _rotate(x_THK: Tensor, scale_T1K: Tensor, sin_T1R2: Tensor, sign: int) -> Tensor:
    """The rotation by +angle (sign 1) or its transpose (sign -1). Products in fp32, one rounding for bf16."""
    half = sin_T1R2.shape[-1]
    y_THK = x_THK * scale_T1K
    y_THK[..., :half].addcmul_(x_THK[..., half : 2 * half], sin_T1R2, value=-sign)
    y_THK[..., half : 2 * half].addcmul_(x_THK[..., :half], sin_T1R2, value=sign)
    return y_THK.to(x_THK.dtype)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THK: Tensor, scale_T1K: Tensor, sin_T1R2: Tensor) -> Tensor:
        ctx.save_for_backward(scale_T1K, sin_T1R2)
        return _rotate(x_THK, scale_T1K, sin_T1R2, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        scale_T1K, sin_T1R2 = ctx.saved_tensors
        return _rotate(grads[0], scale_T1K, sin_T1R2, -1), None, None


def apply_rotary(x_THK: Tensor, scale_T1K: Tensor, sin_T1R2: Tensor) -> Tensor:
    """Rotates the first R dimensions of each head by its token's angle; tables from `rotary_tables`, fp32."""
    return _Rotary.apply(x_THK, scale_T1K, sin_T1R2)  # pyright: ignore[reportReturnType]
