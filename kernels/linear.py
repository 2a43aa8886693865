"""A linear layer's products, on a CPU by the faster of the two libraries that torch carries: MKL or oneDNN.

`torch.mm` calls MKL, which takes its AVX-512 path on Intel's processors only; oneDNN goes by what the processor can do.
On a Zen 5 core (AMD EPYC, family 26) oneDNN computes 220 to 270 GFLOP/s where MKL computes 85 to 120, from 4 rows on
(`phimini bench kernels linear`). Its entry is the operator that inductor puts into compiled models,
`torch.ops.mkldnn._linear_pointwise` (aten/src/ATen/native/mkldnn/Linear.cpp); it has no `out=` and no accumulation.

oneDNN makes code for every shape it meets, half a millisecond and a quarter of a megabyte each, and keeps 1,024 of them.
So products are cut into blocks of 256 rows, and what is left is filled up with zeros: about ten numbers of rows in all.

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
BLOCK_ROWS = 256
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
    """(M, K) @ (K, N) -> (M, N), not differentiable. M may be another one at each call; `b_KN` may be a transposed view."""
    if not uses_onednn(a_MK):
        return torch.mm(a_MK, b_KN)
    w_NK, M = _dense(b_KN.t()), a_MK.shape[0]
    if M <= BLOCK_ROWS or M % BLOCK_ROWS == 0:
        return _product(_padded(a_MK), w_NK)[:M]
    out_MN = a_MK.new_empty(M, b_KN.shape[1])
    for start in range(0, M, BLOCK_ROWS):
        rows = a_MK[start : start + BLOCK_ROWS]
        out_MN[start : start + BLOCK_ROWS] = _product(_padded(rows), w_NK)[: len(rows)]
    return out_MN


def outer(a_MN: Tensor, b_MK: Tensor) -> Tensor:
    """a^T @ b -> (N, K), a weight's gradient; not differentiable. M may be another one at each call."""
    if not uses_onednn(a_MN):
        return torch.mm(a_MN.t(), b_MK)
    size = len(a_MN) if len(a_MN) % BLOCK_ROWS == 0 else BLOCK_ROWS
    total_NK = None
    for a, b in zip(a_MN.split(size), b_MK.split(size), strict=True):
        part_NK = _product(_padded(a).t(), _dense(_padded(b).t()))
        total_NK = part_NK if total_NK is None else total_NK.add_(part_NK)
    assert total_NK is not None, "at least MIN_ROWS rows"
    return total_NK


def _padded(a_MK: Tensor) -> Tensor:
    """With rows of zeros, up to one of the few numbers of rows that oneDNN makes code for."""
    M = a_MK.shape[0]
    quantum = 16 if M <= 64 else 32
    return a_MK if M % quantum == 0 else F.pad(a_MK, (0, 0, 0, -M % quantum))


def _dense(w_NK: Tensor) -> Tensor:
    """Other strides end in oneDNN's reference code, 1,000 times slower."""
    is_dense = w_NK.is_contiguous() or w_NK.t().is_contiguous()
    return w_NK if is_dense else w_NK.contiguous()


def _product(a_MK: Tensor, w_NK: Tensor) -> Tensor:
    assert _linear is not None, "library() is 'onednn'"
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
        dw_NK = outer(dy_MN, x_MK) if ctx.needs_input_grad[1] else None
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
