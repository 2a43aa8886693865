"""Preparation of a head op before its first GEMM: check arguments, drop rows that do not count, size the chunks.

Letters: M rows (tokens), D model width, V vocabulary rows of this rank.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from phimini.kernels.backend.launch import compute_dtype
from phimini.kernels.head.options import HeadOptions

CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 1600 << 20}
"""Logits of one chunk. CPU: 32 MiB, so that the whole op stays near the size of dW. CUDA: 4,096 rows of a
200,064-word vocabulary in bf16; at 256 rows (Liger's choice there) the dW GEMM moves 4.9 GB for 0.31 TFLOP."""
CPU_ROWS = 256
"""Least rows of a chunk on a CPU, where no budget is given: every chunk reads and writes all of dW, so that 41 rows of a
200,064-word vocabulary take 1.4 to 5 times the time of eager torch, and 256 rows 0.8 of it."""
NO_TARGET = -1
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


# --- checks --------------------------------------------------------------------------------------
def check_head(
    options: HeadOptions,
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    temperature: float | Tensor = 1.0,
    main_grad: Tensor | None = None,
    rows: Mapping[str, Tensor | None] | None = None,
) -> None:
    """Raise ValueError for what a caller can get wrong; reads no values of tensors. `rows`: tensors of shape (M,)."""
    op, group = options.op, options.group
    check_tensor(op, "weight_VD", weight_VD, None, has_gradient=True)
    check_tensor(op, "hidden_MD", hidden_MD, weight_VD.device, has_gradient=True)
    check_tensor(op, "targets_M", targets_M, weight_VD.device)
    if hidden_MD.ndim != 2 or weight_VD.ndim != 2 or hidden_MD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"{op}: hidden_MD and weight_VD must be (M, D) and (V, D), "
            f"got {tuple(hidden_MD.shape)} and {tuple(weight_VD.shape)}"
        )
    if hidden_MD.dtype == weight_VD.dtype == torch.float16:
        raise ValueError(
            f"{op}: hidden_MD and weight_VD must not be torch.float16: dX is made in the forward, before a loss scale "
            "could save its small values; use torch.bfloat16"
        )
    if hidden_MD.dtype not in FLOAT_DTYPES or hidden_MD.dtype != weight_VD.dtype:
        raise ValueError(
            f"{op}: hidden_MD and weight_VD must have one floating dtype, got {hidden_MD.dtype} and {weight_VD.dtype}"
        )
    if not weight_VD.is_contiguous():
        raise ValueError(
            f"{op}: weight_VD must be contiguous (row-major), got strides {weight_VD.stride()} for shape {tuple(weight_VD.shape)}"
        )
    if weight_VD.shape[0] == 0:
        raise ValueError(f"{op}: weight_VD must have a row per class, got {tuple(weight_VD.shape)}")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"{op}: group must be a ProcessGroup or None, got {group!r}")
    if options.sequence_parallel and group is None:
        raise ValueError(f"{op}: sequence_parallel needs group, got None")
    num_shares = group.size() if options.sequence_parallel and group is not None else 1
    shape = (hidden_MD.shape[0] * num_shares,)
    if targets_M.dtype != torch.int64:
        raise ValueError(f"{op}: targets_M must be int64, got {targets_M.dtype}")
    check_tensor(op, "targets_M", targets_M, None, shape)
    for name, value_M in (rows or {}).items():
        if value_M is not None:
            check_tensor(op, name, value_M, weight_VD.device, shape)
    if isinstance(temperature, Tensor):
        check_tensor(op, "temperature", temperature, weight_VD.device, shape)
    elif not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
        raise ValueError(
            f"{op}: temperature must be a finite number above 0, or one per row, got {temperature}"
        )
    for name, value, least in (
        ("chunk_bytes", options.chunk_bytes, 1),
        ("max_rows", options.max_rows, 0),
    ):
        if value is not None and (not isinstance(value, int) or value < least):
            raise ValueError(f"{op}: {name} must be an integer of at least {least}, got {value}")
    if not isinstance(options.ignore_index, int):
        raise ValueError(f"{op}: ignore_index must be an integer, got {options.ignore_index}")
    if main_grad is not None:
        _check_main_grad(op, main_grad, weight_VD)


def check_tensor(
    op: str,
    name: str,
    value: object,
    device: torch.device | None,
    shape: tuple[int, ...] | None = None,
    has_gradient: bool = False,
) -> None:
    """Raise ValueError where `value` is no tensor, not on `device`, or not of `shape`, one per row.

    Also where autograd expects a gradient, and the op gives none: silence would stop the training of `value`.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if device is not None and value.device != device:
        raise ValueError(f"{op}: {name} must be on {device} like weight_VD, got {value.device}")
    if value.requires_grad and torch.is_grad_enabled() and not has_gradient:
        raise ValueError(f"{op}: {name} gets no gradient from this op; pass {name}.detach()")
    if shape is not None and value.shape != shape:
        raise ValueError(
            f"{op}: {name} must have shape {shape}, one per row, got {tuple(value.shape)}"
        )


def _check_main_grad(op: str, main_grad: Tensor, weight_VD: Tensor) -> None:
    check_tensor(op, "main_grad", main_grad, weight_VD.device)
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


# --- rows that count -----------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRows:
    """The rows that count, and their places among all rows.

    On a CPU there are no others. On a GPU the host does not know their number: `active_M` marks the rows that count.
    The others stand behind them (within each chunk), are zero, and have no target (-1).
    """

    x_MD: Tensor
    targets_M: Tensor
    kept_M: Tensor | None
    """Indices of these rows among all rows; None when they are all rows, in order."""
    num_total: int
    active_M: Tensor | None = None

    def select(self, value_M: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Return a per-row argument for these rows; 0 where they do not count."""
        if value_M is None:
            return None
        value_M = value_M.to(self.targets_M.device, dtype)
        if self.kept_M is not None:
            value_M = value_M.index_select(0, self.kept_M)
        return value_M if self.active_M is None else value_M.where(self.active_M, 0)

    def weights(self, weight_M: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return row weights: 1 by default, 0 for rows that do not count."""
        if weight_M is not None:
            selected_M = self.select(weight_M, dtype)
            assert selected_M is not None, "selected from a tensor"
            return selected_M
        if self.active_M is not None:
            return self.active_M.to(dtype)
        return torch.ones_like(self.targets_M, dtype=dtype)

    def sum(self, values_KM: Tensor, rows: slice) -> Tensor:
        """Return (K,) sums over the rows of a chunk that count."""
        if self.active_M is not None:
            values_KM = values_KM.where(self.active_M[rows], 0)
        return values_KM.sum(1)

    def expand(self, value_M: Tensor) -> Tensor:
        """Put per-row results back in their places; rows that do not count give 0."""
        if self.kept_M is None:
            return value_M
        out = value_M.new_zeros(self.num_total, *value_M.shape[1:])
        return out.index_copy_(0, self.kept_M, value_M)


def rows_at(hidden_MD: Tensor, targets_M: Tensor, kept_M: Tensor | None) -> HeadRows:
    """Return the rows of the indices `kept_M`, or all rows; later work skips the others."""
    if kept_M is None:
        hidden_MD = hidden_MD.contiguous()
    else:
        hidden_MD = hidden_MD.index_select(0, kept_M)
    return HeadRows(
        x_MD=hidden_MD,
        targets_M=targets_M if kept_M is None else targets_M.index_select(0, kept_M),
        kept_M=kept_M,
        num_total=len(targets_M),
    )


def move_counting_rows_first(
    hidden_MD: Tensor,
    targets_M: Tensor,
    counts_M: Tensor,
    segment_M: Tensor | None,
    max_rows: int | None,
) -> HeadRows:
    """Return all rows in a stable partition, those that count first, per segment if there are any.

    The host need not know how many rows count. `max_rows`: an upper bound that the caller gives.
    """
    M = len(targets_M)
    key_M = (~counts_M).to(torch.int64) if segment_M is None else 2 * segment_M + ~counts_M
    kept_M = key_M.argsort(stable=True)
    if max_rows is not None and max_rows < M:
        torch.ops.aten._assert_async.msg(
            counts_M.sum() <= max_rows, f"more rows count than max_rows {max_rows}"
        )
        kept_M = kept_M[:max_rows]
    active_M = counts_M.index_select(0, kept_M)
    # Ignored rows are later multiplied by 0, and 0 * NaN would be NaN: so they are zeros.
    return HeadRows(
        x_MD=hidden_MD.index_select(0, kept_M).masked_fill_(~active_M[:, None], 0),
        targets_M=targets_M.index_select(0, kept_M).where(active_M, NO_TARGET),
        kept_M=kept_M,
        num_total=M,
        active_M=active_M,
    )


def chunk_rows(kind: str, runs_triton: bool, row_bytes: int, chunk_bytes: int | None) -> int:
    """Return the rows of logits, `row_bytes` each, that a budget holds, on a device of this kind ("cpu", "cuda").

    At least 16, and at least CPU_ROWS on a CPU without a budget; whole row blocks of 128 for the kernels.
    """
    kind = "cpu" if kind == "cpu" else "cuda"
    least = CPU_ROWS if chunk_bytes is None and kind == "cpu" else 16
    rows = max(least, (chunk_bytes or CHUNK_BYTES[kind]) // row_bytes)
    return rows // 128 * 128 if rows > 128 and runs_triton else rows


def chunk_slices(num_rows: int, rows_at_most: int, multiple: int = 32) -> list[slice]:
    """Cut the rows into even chunks of at most `rows_at_most`, so that the last one is not a small rest."""
    chunks: list[slice] = []
    num_chunks = -(-num_rows // rows_at_most)
    rows = -(-num_rows // max(1, num_chunks))
    if num_chunks > 1 and rows > multiple:
        rows = min(-(-rows // multiple) * multiple, rows_at_most)
    for first in range(0, num_rows, max(1, rows)):
        chunks.append(slice(first, min(first + rows, num_rows)))  # noqa: PERF401
    return chunks
