"""What every head op does before its first GEMM: check arguments, drop rows that do not count, size the chunks.

Letters: M rows (tokens), D model width, V vocabulary rows of this rank.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 1536 << 20}
"""Logits of one chunk. CPU: 32 MiB, so that the whole op stays near the size of dW. CUDA: 4,096 rows of a
200,064-word vocabulary in bf16; at 256 rows (Liger's choice there) the dW GEMM moves 4.9 GB for 0.31 TFLOP."""
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRows:
    """The rows that count, and where they came from."""

    x_MD: Tensor
    targets_M: Tensor
    kept_M: Tensor | None
    """indices of these rows among all rows; None when every row counts"""
    num_total: int

    def select(self, value_M: Tensor | None) -> Tensor | None:
        """A per-row argument, for the rows that count."""
        return (
            value_M
            if value_M is None or self.kept_M is None
            else value_M.index_select(0, self.kept_M)
        )

    def expand(self, value_M: Tensor) -> Tensor:
        """Per-row results put back in their places; rows that do not count give 0."""
        if self.kept_M is None:
            return value_M
        out = value_M.new_zeros(self.num_total, *value_M.shape[1:])
        return out.index_copy_(0, self.kept_M, value_M)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_head(
    op: str,
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    temperature: float | Tensor,
    group: dist.ProcessGroup | None,
    sequence_parallel: bool,
    chunk_bytes: int | None,
) -> None:
    """Raise ValueError for what a caller can get wrong; reads no values of tensors."""
    if hidden_MD.ndim != 2 or weight_VD.ndim != 2 or hidden_MD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"{op}: hidden_MD and weight_VD must be (M, D) and (V, D), "
            f"got {tuple(hidden_MD.shape)} and {tuple(weight_VD.shape)}"
        )
    if hidden_MD.dtype not in FLOAT_DTYPES or hidden_MD.dtype != weight_VD.dtype:
        raise ValueError(
            f"{op}: hidden_MD and weight_VD must have one floating dtype, got {hidden_MD.dtype} and {weight_VD.dtype}"
        )
    if not weight_VD.is_contiguous():
        raise ValueError(
            f"{op}: weight_VD must be contiguous (row-major), got strides {weight_VD.stride()} for shape {tuple(weight_VD.shape)}"
        )
    if sequence_parallel and group is None:
        raise ValueError(f"{op}: sequence_parallel needs group, got None")
    num_rows = hidden_MD.shape[0] * (group.size() if sequence_parallel and group is not None else 1)
    if targets_M.dtype != torch.int64:
        raise ValueError(f"{op}: targets_M must be int64, got {targets_M.dtype}")
    check_rows(op, "targets_M", targets_M, num_rows)
    if isinstance(temperature, Tensor):
        check_rows(op, "temperature", temperature, num_rows)
    elif not temperature > 0:
        raise ValueError(f"{op}: temperature must be above 0, got {temperature}")
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"{op}: chunk_bytes must be positive, got {chunk_bytes}")


def check_rows(op: str, name: str, value_M: Tensor | None, num_rows: int) -> None:
    if value_M is not None and value_M.shape != (num_rows,):
        raise ValueError(
            f"{op}: {name} must have shape ({num_rows},), one per row, got {tuple(value_M.shape)}"
        )


def check_main_grad(op: str, main_grad: Tensor | None, weight_VD: Tensor) -> None:
    if main_grad is None:
        return
    expected = compute_dtype(weight_VD.dtype)
    if (
        main_grad.shape != weight_VD.shape
        or main_grad.dtype != expected
        or not main_grad.is_contiguous()
    ):
        raise ValueError(
            f"{op}: main_grad must be a contiguous {expected} tensor of weight_VD's shape {tuple(weight_VD.shape)}, "
            f"got {main_grad.dtype} {tuple(main_grad.shape)} with strides {main_grad.stride()}"
        )


def check_targets(op: str, targets_M: Tensor, kept_M: Tensor | None, vocab_size: int) -> None:
    """ValueError with the index and the value of the first target outside [0, vocab_size)."""
    if targets_M.numel() == 0:
        return
    low, high = targets_M.aminmax()
    if low >= 0 and high < vocab_size:
        return
    at = int(((targets_M < 0) | (targets_M >= vocab_size)).nonzero()[0])
    row = at if kept_M is None else int(kept_M[at])
    raise ValueError(
        f"{op}: targets_M[{row}] is {int(targets_M[at])}, expected a class in [0, {vocab_size}) or ignore_index"
    )


def keep_counting_rows(
    op: str,
    hidden_MD: Tensor,
    targets_M: Tensor,
    weights_M: Tensor | None,
    ignore_index: int,
    vocab_size: int,
) -> HeadRows:
    """Rows whose target is not `ignore_index` and whose weight is not 0; the others cost nothing from here on."""
    counts_M = targets_M != ignore_index
    if weights_M is not None:
        counts_M &= weights_M != 0
    kept_M = None if bool(counts_M.all()) else counts_M.nonzero()[:, 0]
    if kept_M is not None:
        targets_M = targets_M.index_select(0, kept_M)
        rows_MD = hidden_MD.index_select(0, kept_M)
    else:
        rows_MD = hidden_MD.contiguous()
    check_targets(op, targets_M, kept_M, vocab_size)
    return HeadRows(x_MD=rows_MD, targets_M=targets_M, kept_M=kept_M, num_total=hidden_MD.shape[0])


def chunk_slices(num_rows: int, rows_at_most: int, multiple: int = 8) -> list[slice]:
    """Even chunks of at most `rows_at_most` rows, so that the last one is not a crumb."""
    if num_rows == 0:
        return []
    num_chunks = -(-num_rows // rows_at_most)
    rows = -(-num_rows // num_chunks)
    if num_chunks > 1 and rows > multiple:
        rows = min(-(-rows // multiple) * multiple, rows_at_most)
    return [slice(a, min(a + rows, num_rows)) for a in range(0, num_rows, rows)]
