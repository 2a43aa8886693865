"""Matrix products on a CPU, in fp32 by the faster of the two libraries that torch carries: MKL or oneDNN.

`torch.mm` calls MKL, which takes its AVX-512 path on Intel's processors only; oneDNN takes every processor's. On a Zen 5
core (AMD EPYC, family 26) oneDNN computes 220 to 270 GFLOP/s and MKL 85 to 120, from 4 rows on
(`phimini bench kernels linear`). Its entry is the operator that inductor puts into compiled models,
`torch.ops.mkldnn._linear_pointwise` (aten/src/ATen/native/mkldnn/Linear.cpp). It has no `out=` and no accumulation.

oneDNN generates code for every new shape, half a millisecond and a quarter of a megabyte each, and caches 1,024 of them.
So products are cut into blocks of 256 rows and the rest is padded with zeros: about ten numbers of rows in all.

The choice follows from the processor and never from a timing: the same machine gives the same bits every time.
PHIMINI_CPU_GEMM=mkl or onednn overrides it.
"""

import functools
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from phimini.kernels.backend.launch import on_gpu

LIBRARIES = ("mkl", "onednn")
MIN_ROWS = 4
"""Fewest rows for oneDNN: below, its packing costs more than the product."""
BLOCK_ROWS = 256
ADD_BLOCK_ELEMENTS = 1 << 18
"""Elements of a sum that `add_outer` adds at a time with oneDNN: 1 MiB of fp32, still in the cache."""
_product = None
"""(M, K), (N, K) -> (M, N) by oneDNN; None where torch was built without it."""
if torch.backends.mkldnn.is_available():
    _product = functools.partial(
        torch.ops.mkldnn._linear_pointwise.default, B=None, attr="none", scalars=[], algorithm=""
    )


@functools.cache
def library() -> str:
    """Return "mkl" or "onednn", the library for fp32 products on this CPU.

    Raises ValueError for another PHIMINI_CPU_GEMM, or for "onednn" in a torch that was built without it.
    """
    wanted = os.environ.get("PHIMINI_CPU_GEMM", "")
    if wanted and wanted not in LIBRARIES:
        raise ValueError(f"PHIMINI_CPU_GEMM must be one of {', '.join(LIBRARIES)}; got {wanted!r}")
    if wanted == "onednn" and _product is None:
        raise ValueError("PHIMINI_CPU_GEMM is onednn, but this torch was built without oneDNN")
    if wanted:
        return wanted
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return "onednn" if _product is not None and has_avx512 and not _is_intel() else "mkl"


def _is_intel() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return not cpuinfo.exists() or "GenuineIntel" in cpuinfo.read_text()


def uses_onednn(a: Tensor) -> bool:
    """Return whether a product with `a`, of shape (M, K), goes to oneDNN."""
    return (
        a.dtype == torch.float32
        and a.device.type == "cpu"
        and a.shape[0] >= MIN_ROWS
        and library() == "onednn"
    )


def matmul(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """Return a @ b, (M, K) @ (K, N) -> (M, N), not differentiable.

    M may change from call to call. `b_KN` may be a transposed view.
    """
    if not uses_onednn(a_MK):
        return torch.mm(a_MK, b_KN)
    assert _product is not None, "library() is 'onednn'"
    w_NK, M = _dense(b_KN.t()), a_MK.shape[0]
    if M <= BLOCK_ROWS or M % BLOCK_ROWS == 0:
        return _product(_padded(a_MK), w_NK)[:M]
    out_MN = a_MK.new_empty(M, b_KN.shape[1])
    for start in range(0, M, BLOCK_ROWS):
        rows = a_MK[start : start + BLOCK_ROWS]
        out_MN[start : start + BLOCK_ROWS] = _product(_padded(rows), w_NK)[: len(rows)]
    return out_MN


def outer(a_MN: Tensor, b_MK: Tensor) -> Tensor:
    """Return a^T @ b, (N, K), the gradient of a weight; not differentiable. M may change from call to call."""
    if not uses_onednn(a_MN):
        return torch.mm(a_MN.t(), b_MK)
    assert _product is not None, "library() is 'onednn'"
    size = len(a_MN) if len(a_MN) % BLOCK_ROWS == 0 else BLOCK_ROWS
    total_NK = None
    for a, b in zip(a_MN.split(size), b_MK.split(size), strict=True):
        part_NK = _product(_padded(a).t(), _dense(_padded(b).t()))
        total_NK = part_NK if total_NK is None else total_NK.add_(part_NK)
    assert total_NK is not None, "at least MIN_ROWS rows"
    return total_NK


def add_outer(total_NK: Tensor, a_MN: Tensor, b_MK: Tensor) -> None:
    """Add a^T @ b to `total_NK` in place. oneDNN does not accumulate: there, block by block of the columns of a."""
    if not uses_onednn(a_MN):
        total_NK.addmm_(a_MN.t(), b_MK)
        return
    block = max(1, ADD_BLOCK_ELEMENTS // total_NK.shape[1])
    for start in range(0, total_NK.shape[0], block):
        total_NK[start : start + block] += outer(a_MN[:, start : start + block], b_MK)


def add_product(total_NK: Tensor, a_NM: Tensor, b_MK: Tensor) -> None:
    """Add a @ b to `total_NK` in place, in its dtype. On a GPU a and b may be narrower: cuBLAS sums in fp32 and adds."""
    if on_gpu(total_NK):
        torch.addmm(total_NK, a_NM, b_MK, out=total_NK, out_dtype=total_NK.dtype)
    else:
        add_outer(total_NK, a_NM.t().to(total_NK.dtype), b_MK.to(total_NK.dtype))


def _padded(a_MK: Tensor) -> Tensor:
    """Append rows of zeros, up to one of the few numbers of rows that oneDNN generates code for."""
    M = a_MK.shape[0]
    quantum = 16 if M <= 64 else 32
    return a_MK if M % quantum == 0 else F.pad(a_MK, (0, 0, 0, -M % quantum))


def _dense(w_NK: Tensor) -> Tensor:
    """Copy other strides: they end in oneDNN's reference code, 1,000 times slower."""
    is_dense = w_NK.is_contiguous() or w_NK.t().is_contiguous()
    return w_NK if is_dense else w_NK.contiguous()
