"""The rotation of queries and keys as one autograd function: nothing but the tables is kept for backward.

T tokens, H heads, K head size, R rotated dimensions of K. `model/rope.py` defines the angles.
"""

from typing import Any

import torch
from torch import Tensor


def _rotate(x_THK: Tensor, cos_T1R: Tensor, sin_T1R: Tensor, sign: int) -> Tensor:
    """The rotation by +angle (sign 1) or its transpose (sign -1); tables are (T, 1, R/2)."""
    half = cos_T1R.shape[-1]
    x1, x2 = x_THK[..., :half], x_THK[..., half : 2 * half]
    y = torch.empty(x_THK.shape, dtype=x_THK.dtype, device=x_THK.device)
    y[..., 2 * half :] = x_THK[..., 2 * half :]
    y[..., :half] = torch.addcmul(x1 * cos_T1R, x2, sin_T1R, value=-sign)
    y[..., half : 2 * half] = torch.addcmul(x2 * cos_T1R, x1, sin_T1R, value=sign)
    return y


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THK: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> Tensor:
        ctx.save_for_backward(cos_T1R, sin_T1R)
        return _rotate(x_THK, cos_T1R, sin_T1R, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _rotate(grads[0], *ctx.saved_tensors, -1), None, None


def apply_rotary(x_THK: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> Tensor:
    """Rotates the first R dimensions of each head by its token's angle; the factor in the tables scales them too.

    Tables (T, 1, R/2), fp32: for bf16 heads the products are taken in fp32 and rounded once.
    """
    return _Rotary.apply(x_THK, cos_T1R, sin_T1R)  # pyright: ignore[reportReturnType]
