"""What every head op does before its first GEMM: check arguments, drop rows that do not count, size the chunks.

Letters: M rows (tokens), D model width, V vocabulary rows of this rank.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from phimini.kernels._launch import compute_dtype
from phimini.kernels.head.deferred_checks import check_later

CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 1536 << 20}
"""Logits of one chunk. CPU: 32 MiB, so that the whole op stays near the size of dW. CUDA: 4,096 rows of a
200,064-word vocabulary in bf16; at 256 rows (Liger's choice there) the dW GEMM moves 4.9 GB for 0.31 TFLOP."""
NO_TARGET = -1
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRows:
    """The rows that count, and where they came from.

    On a CPU there are no others. On a GPU their number is not known to the host: `active_M` then says which rows
    count, the others stand behind them (within each chunk), are zero, and have no target (-1).
    """

    x_MD: Tensor
    targets_M: Tensor
    kept_M: Tensor | None
    """indices of these rows among all rows; None when they are all rows, in order"""
    num_total: int
    active_M: Tensor | None = None

    def __len__(self) -> int:
        return self.targets_M.shape[0]

    def select(self, value_M: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """A per-row argument for these rows; 0 where they do not count."""
        if value_M is None:
            return None
        value_M = value_M.to(self.targets_M.device, dtype)
        if self.kept_M is not None:
            value_M = value_M.index_select(0, self.kept_M)
        return value_M if self.active_M is None else value_M.where(self.active_M, 0)

    def weights(self, weight_M: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Row weights, 1 without; 0 for rows that do not count."""
        selected_M = self.select(weight_M, dtype)
        if selected_M is not None:
            return selected_M
        if self.active_M is not None:
            return self.active_M.to(dtype)
        return torch.ones_like(self.targets_M, dtype=dtype)

    def sum(self, values_KM: Tensor, rows: slice) -> Tensor:
        """(K,) sums over the rows of a chunk that count."""
        if self.active_M is not None:
            values_KM = values_KM.where(self.active_M[rows], 0)
        return values_KM.sum(1)

    def count(self, rows: slice) -> Tensor:
        """(1,) int32: how many rows of a chunk count; they come first."""
        if self.active_M is None:
            return self.targets_M.new_full((1,), rows.stop - rows.start, dtype=torch.int32)
        return self.active_M[rows].sum(0, dtype=torch.int32)[None]

    def expand(self, value_M: Tensor) -> Tensor:
        """Per-row results put back in their places; rows that do not count give 0."""
        if self.kept_M is None:
            return value_M
        out = value_M.new_zeros(self.num_total, *value_M.shape[1:])
        return out.index_copy_(0, self.kept_M, value_M)


def check_head(
    op: str,
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    temperature: float | Tensor,
    group: dist.ProcessGroup | None,
    sequence_parallel: bool,
    chunk_bytes: int | None,
    max_rows: int | None,
    ignore_index: int,
) -> None:
    """Raise ValueError for what a caller can get wrong; reads no values of tensors."""
    check_tensor(op, "weight_VD", weight_VD, None)
    for name, value in (("hidden_MD", hidden_MD), ("targets_M", targets_M)):
        check_tensor(op, name, value, weight_VD.device)
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
    if weight_VD.shape[0] == 0:
        raise ValueError(f"{op}: weight_VD must have a row per class, got {tuple(weight_VD.shape)}")
    check_group(op, "group", group)
    if sequence_parallel and group is None:
        raise ValueError(f"{op}: sequence_parallel needs group, got None")
    num_rows = hidden_MD.shape[0] * (group.size() if sequence_parallel and group is not None else 1)
    if targets_M.dtype != torch.int64:
        raise ValueError(f"{op}: targets_M must be int64, got {targets_M.dtype}")
    check_rows(op, "targets_M", targets_M, num_rows)
    if isinstance(temperature, Tensor):
        check_rows(op, "temperature", temperature, num_rows, weight_VD.device)
    elif not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
        raise ValueError(
            f"{op}: temperature must be a finite number above 0, or one per row, got {temperature}"
        )
    for name, value, least in (("chunk_bytes", chunk_bytes, 1), ("max_rows", max_rows, 0)):
        if value is not None and (not isinstance(value, int) or value < least):
            raise ValueError(f"{op}: {name} must be an integer of at least {least}, got {value}")
    if not isinstance(ignore_index, int):
        raise ValueError(f"{op}: ignore_index must be an integer, got {ignore_index}")


def check_tensor(op: str, name: str, value: object, device: torch.device | None) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if device is not None and value.device != device:
        raise ValueError(f"{op}: {name} must be on {device} like weight_VD, got {value.device}")


def check_group(op: str, name: str, group: object) -> None:
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"{op}: {name} must be a ProcessGroup or None, got {group!r}")


def check_rows(
    op: str, name: str, value_M: Tensor | None, num_rows: int, device: torch.device | None = None
) -> None:
    if value_M is None:
        return
    check_tensor(op, name, value_M, device)
    if value_M.shape != (num_rows,):
        raise ValueError(
            f"{op}: {name} must have shape ({num_rows},), one per row, got {tuple(value_M.shape)}"
        )


def check_main_grad(op: str, main_grad: Tensor | None, weight_VD: Tensor) -> None:
    if main_grad is None:
        return
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


def check_targets(op: str, targets_M: Tensor, counts_M: Tensor, vocab_size: int) -> None:
    """ValueError with the index and the value of the first target outside [0, vocab_size)."""
    bad_M = ((targets_M < 0) | (targets_M >= vocab_size)) & counts_M
    message = "{}: targets_M[{}] is {:.0f}, expected a class in [0, {}) or ignore_index"
    _report(bad_M, targets_M, lambda at, value: message.format(op, at, value, vocab_size))


def check_temperatures(op: str, temperature_M: Tensor, counts_M: Tensor) -> None:
    """ValueError with the index and the value of the first that is not a finite number above 0."""
    bad_M = ~((temperature_M > 0) & temperature_M.isfinite()) & counts_M
    message = "{}: temperature[{}] is {:g}, expected a finite number above 0"
    _report(bad_M, temperature_M, lambda at, value: message.format(op, at, value))


def _report(bad_M: Tensor, value_M: Tensor, message: Callable[[int, float], str]) -> None:
    if value_M.numel() == 0:
        return
    if value_M.device.type != "cpu":
        check_later(bad_M, value_M, message)
    elif bool(bad_M.any()):
        at = int(bad_M.nonzero()[0])
        raise ValueError(message(at, float(value_M[at])))


def keep_counting_rows(hidden_MD: Tensor, targets_M: Tensor, counts_M: Tensor) -> HeadRows:
    """The rows that `counts_M` names, on a CPU; the others cost nothing from here on."""
    if bool(counts_M.all()):
        return HeadRows(
            x_MD=hidden_MD.contiguous(), targets_M=targets_M, kept_M=None, num_total=len(targets_M)
        )
    kept_M = counts_M.nonzero()[:, 0]
    return rows_at(hidden_MD, targets_M, kept_M)


def rows_at(hidden_MD: Tensor, targets_M: Tensor, kept_M: Tensor) -> HeadRows:
    return HeadRows(
        x_MD=hidden_MD.index_select(0, kept_M),
        targets_M=targets_M.index_select(0, kept_M),
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
    """The same without the host knowing how many there are: a stable partition, per segment if there are any.

    `max_rows`: what the caller knows their number not to exceed.
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
    rows = rows_at(hidden_MD, targets_M, kept_M)
    # Rows that do not count are multiplied by zeros later: whatever they hold, not a NaN.
    return replace(
        rows,
        x_MD=rows.x_MD.masked_fill_(~active_M[:, None], 0),
        targets_M=rows.targets_M.where(active_M, NO_TARGET),
        active_M=active_M,
    )


def chunk_slices(num_rows: int, rows_at_most: int, multiple: int = 32) -> list[slice]:
    """Even chunks of at most `rows_at_most` rows, so that the last one is not a crumb."""
    if num_rows == 0:
        return []
    num_chunks = -(-num_rows // rows_at_most)
    rows = -(-num_rows // num_chunks)
    if num_chunks > 1 and rows > multiple:
        rows = min(-(-rows // multiple) * multiple, rows_at_most)
    return [slice(a, min(a + rows, num_rows)) for a in range(0, num_rows, rows)]
