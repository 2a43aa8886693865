"""A linear layer without a bias: F.linear, with the CPU's faster library for fp32 (kernels/backend/cpu_gemm.py).

    y = x w^T        dx = dy w        dw = dy^T x

Deterministic for a fixed number of threads. Bound: compute, 2 * M * K * N FLOPs for each of the three products.

Letters: M rows (all leading dims), K input width, N output width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from phimini.kernels.backend.cpu_gemm import add_product, matmul, outer, uses_onednn


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w_NK: Tensor, main_grad: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w_NK)
        # Not saved: main_grad is written before and after, on purpose, and the mark is for the parameter itself.
        ctx.added_to = None if main_grad is None else (w_NK, main_grad)
        y_MN = matmul(x.reshape(-1, x.shape[-1]), w_NK.t())
        return y_MN.view(*x.shape[:-1], w_NK.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, w_NK = ctx.saved_tensors
        dy_MN, x_MK = (t.reshape(-1, t.shape[-1]) for t in (dy, x))
        dx = matmul(dy_MN, w_NK).view(x.shape) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None, None
        if ctx.added_to is None:
            return dx, outer(dy_MN, x_MK), None
        parameter, main_grad = ctx.added_to
        add_product(main_grad, dy_MN.t(), x_MK)
        parameter.grad_added_to_main_grad = True
        return dx, torch.empty_like(w_NK), None


def linear_reference(x: Tensor, w_NK: Tensor) -> Tensor:
    """The definition: (..., K), (N, K) -> (..., N), by torch."""
    return x @ w_NK.T


def linear(x: Tensor, w_NK: Tensor, *, main_grad: Tensor | None = None) -> Tensor:
    """Return x w^T, (..., K), (N, K) -> (..., N), as `F.linear` without a bias; differentiable once.

    main_grad (N, K), fp32: backward adds dW to it, in the product's own accumulators, instead of returning dW. By the
    protocol of Megatron's DDP it then sets `w_NK.grad_added_to_main_grad`, and gives w_NK a gradient without values,
    for the hooks that wait for one.
    """
    if x.dim() == 1:
        return F.linear(x, w_NK)
    if main_grad is not None:
        return _Linear.apply(x, w_NK, main_grad)  # pyright: ignore[reportReturnType]
    x_MK = x.flatten(0, -2)
    if torch.compiler.is_compiling() or not uses_onednn(x_MK):  # a compiler chooses for itself
        return F.linear(x, w_NK)
    if torch.is_grad_enabled():
        return _Linear.apply(x, w_NK, None)  # pyright: ignore[reportReturnType]
    return matmul(x_MK, w_NK.t()).view(*x.shape[:-1], w_NK.shape[0])
