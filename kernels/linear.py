"""A linear layer's products, on a CPU by the faster of the two libraries that torch carries: MKL or oneDNN.

`torch.mm` calls MKL, which takes its AVX-512 path on Intel's processors only; oneDNN goes by what the processor can do.
On a Zen 5 core (AMD EPYC, family 26) oneDNN computes 220 to 270 GFLOP/s where MKL computes 85 to 120, from 4 rows on
(`phimini bench kernels linear`). Its entry is the operator that inductor puts into compiled models,
`torch.ops.mkldnn._linear_pointwise` (aten/src/ATen/native/mkldnn/Linear.cpp); it has no `out=` and no accumulation.

Which one is used is a property of the processor, never of a timing: the same machine gives the same bits every time.
PHIMINI_CPU_GEMM=mkl or onednn decides otherwise.
"""

import functools
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LIBRARIES = ("mkl", "onednn")
MIN_ROWS = 4
"""Below, oneDNN's packing costs more than the product."""
_linear = (
    torch.ops.mkldnn._linear_pointwise.default if torch.backends.mkldnn.is_available() else None
)


@functools.cache
def library() -> str:
    """'mkl' or 'onednn': what computes fp32 products on this CPU. ValueError for another PHIMINI_CPU_GEMM."""
    wanted = os.environ.get("PHIMINI_CPU_GEMM", "")
    if wanted and wanted not in LIBRARIES:
        raise ValueError(f"PHIMINI_CPU_GEMM must be one of {', '.join(LIBRARIES)}; got {wanted!r}")
    if wanted == "onednn" and _linear is None:
        raise ValueError("PHIMINI_CPU_GEMM is onednn, but this torch was built without oneDNN")
    if wanted:
        return wanted
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return "onednn" if _linear is not None and has_avx512 and not _is_intel() else "mkl"


def _is_intel() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return not cpuinfo.exists() or "GenuineIntel" in cpuinfo.read_text()


def uses_onednn(a: Tensor) -> bool:
    """Whether a product with `a`, of shape (M, K), goes to oneDNN."""
    return (
        a.dtype == torch.float32
        and a.device.type == "cpu"
        and a.shape[0] >= MIN_ROWS
        and library() == "onednn"
    )


def matmul(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """(M, K) @ (K, N) -> (M, N), not differentiable. `b_KN` may be a transposed view at no cost."""
    if not uses_onednn(a_MK):
        return torch.mm(a_MK, b_KN)
    assert _linear is not None
    w_NK = b_KN.t()
    if not w_NK.is_contiguous() and not b_KN.is_contiguous():
        w_NK = w_NK.contiguous()  # other strides end in oneDNN's reference code, 1,000 times slower
    return _linear(a_MK, w_NK, None, "none", [], "")


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
        dw_NK = matmul(dy_MN.t(), x_MK) if ctx.needs_input_grad[1] else None
        return dx_MK, dw_NK


def linear_reference(x: Tensor, w_NK: Tensor) -> Tensor:
    """(..., K), (N, K) -> (..., N)"""
    return x @ w_NK.T


def linear(x: Tensor, w_NK: Tensor) -> Tensor:
    """`F.linear` without a bias: (..., K), (N, K) -> (..., N), differentiable once."""
    if x.dim() == 1:
        return F.linear(x, w_NK)
    x_MK = x.flatten(0, -2)
    if not uses_onednn(x_MK):
        return F.linear(x, w_NK)
    y_MN = _Linear.apply(x_MK, w_NK) if torch.is_grad_enabled() else matmul(x_MK, w_NK.t())
    return y_MN.view(*x.shape[:-1], w_NK.shape[0])  # pyright: ignore[reportAttributeAccessIssue]
