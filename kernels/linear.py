"""A linear layer without a bias: F.linear, with the CPU's faster library for fp32 (kernels/backend/cpu_gemm.py).

    y = x w^T        dx = dy w        dw = dy^T x

Deterministic for a fixed number of threads. Bound: compute, 2 * M * K * N FLOPs for each of the three products.

Letters: M rows (all leading dims), K input width, N output width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from phimini.kernels.backend.cpu_gemm import matmul, outer, uses_onednn


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_MK: Tensor, w_NK: Tensor) -> Tensor:
        ctx.save_for_backward(x_MK, w_NK)
        return matmul(x_MK, w_NK.t())

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_MN: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_MK, w_NK = ctx.saved_tensors
        dx_MK = matmul(dy_MN, w_NK) if ctx.needs_input_grad[0] else None
        dw_NK = outer(dy_MN, x_MK) if ctx.needs_input_grad[1] else None
        return dx_MK, dw_NK


def linear_reference(x: Tensor, w_NK: Tensor) -> Tensor:
    """The definition: (..., K), (N, K) -> (..., N), by torch."""
    return x @ w_NK.T


def linear(x: Tensor, w_NK: Tensor) -> Tensor:
    """Return x w^T, (..., K), (N, K) -> (..., N), as `F.linear` without a bias; differentiable once."""
    if x.dim() == 1:
        return F.linear(x, w_NK)
    x_MK = x.flatten(0, -2)
    if torch.compiler.is_compiling() or not uses_onednn(x_MK):  # a compiler chooses for itself
        return F.linear(x, w_NK)
    y_MN = _Linear.apply(x_MK, w_NK) if torch.is_grad_enabled() else matmul(x_MK, w_NK.t())
    return y_MN.view(*x.shape[:-1], w_NK.shape[0])  # pyright: ignore[reportAttributeAccessIssue]
