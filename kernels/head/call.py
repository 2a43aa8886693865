"""One call of a head op, in types a custom op can carry, and what it is turned into: rows, chunks, a back-end.

Custom ops carry tensors, numbers and names, not process groups: a group travels as its name.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from phimini.kernels._launch import compute_dtype
from phimini.kernels.head.chunked import ChunkedHead
from phimini.kernels.head.deferred_checks import raise_pending
from phimini.kernels.head.rows import (
    CHUNK_BYTES,
    HeadRows,
    check_targets,
    check_temperatures,
    chunk_slices,
    keep_counting_rows,
    move_counting_rows_first,
)
from phimini.kernels.head.torch_backend import TorchHead
from phimini.kernels.head.triton_backend import TritonHead


def name_of(group: dist.ProcessGroup | None) -> str:
    """'' for no group, or a group of one, which needs no communication."""
    return "" if group is None or group.size() == 1 else group.group_name


def group_of(name: str) -> dist.ProcessGroup | None:
    if not name:
        return None
    return distributed_c10d._resolve_process_group(name)  # pyright: ignore


@dataclass(slots=True, kw_only=True)
class HeadCall:
    """Arguments common to the ops. `hidden_MD` becomes the rows of all ranks where they were split."""

    op: str
    hidden_MD: Tensor
    weight_VD: Tensor
    targets_M: Tensor
    temperature_M: Tensor | None
    temperature: float
    ignore_index: int
    group_name: str
    sequence_parallel: bool
    """hidden_MD came as this rank's share of the rows, in rank order"""
    chunk_bytes: int
    """of logits; 0 for the device's default"""
    max_rows: int
    """how many rows count at most; -1 if the caller does not know"""
    backend: str
    """'torch' or 'triton'; '' for the one that fits device and dtype"""
    group: dist.ProcessGroup | None = field(init=False)

    def __post_init__(self) -> None:
        raise_pending()
        self.group = group_of(self.group_name)
        if not self.backend:
            is_narrow = self.weight_VD.dtype in (torch.bfloat16, torch.float16)
            self.backend = "triton" if self.weight_VD.is_cuda and is_narrow else "torch"
        if self.sequence_parallel and self.group is not None:
            own_MD = self.hidden_MD.contiguous()
            self.hidden_MD = own_MD.new_empty(own_MD.shape[0] * self.group.size(), own_MD.shape[1])
            dist.all_gather_into_tensor(self.hidden_MD, own_MD, group=self.group)

    @property
    def dtype(self) -> torch.dtype:
        """of statistics, losses and dW"""
        return compute_dtype(self.weight_VD.dtype)

    @property
    def num_classes(self) -> int:
        return self.weight_VD.shape[0] * (1 if self.group is None else self.group.size())

    @property
    def is_counted_on_device(self) -> bool:
        """The host does not learn how many rows count: it would have to wait for the GPU."""
        return self.weight_VD.device.type != "cpu" or self.backend == "triton"

    @property
    def chunk_rows(self) -> int:
        """How many rows of logits the byte budget holds: at least 16, and whole row blocks of 128 on a GPU."""
        element_bytes = self.dtype.itemsize if self.backend == "torch" else self.weight_VD.itemsize
        is_cpu = self.weight_VD.device.type == "cpu"
        budget = self.chunk_bytes or CHUNK_BYTES["cpu" if is_cpu else "cuda"]
        rows = max(16, budget // (self.weight_VD.shape[0] * element_bytes))
        return rows // 128 * 128 if rows > 128 and self.backend == "triton" else rows

    def without_autocast(self) -> AbstractContextManager:
        """The op says what is fp32; autocast would narrow the products inside it. A meta device has none."""
        kind = self.weight_VD.device.type
        has_one = torch.amp.is_autocast_available(kind)
        return torch.autocast(kind, enabled=False) if has_one else nullcontext()

    def counts(self, weights_M: Tensor | None) -> Tensor:
        """(M,) bool: rows whose target is not `ignore_index` and whose weight is not 0. Checks the targets."""
        counts_M = self.targets_M != self.ignore_index
        if weights_M is not None:
            counts_M &= weights_M != 0
        check_targets(self.op, self.targets_M, counts_M, self.num_classes)
        if self.temperature_M is not None:
            check_temperatures(self.op, self.temperature_M, counts_M)
        if self.max_rows >= 0 and counts_M.device.type == "cpu" and counts_M.sum() > self.max_rows:
            raise ValueError(
                f"{self.op}: max_rows is {self.max_rows}, but {int(counts_M.sum())} rows count"
            )
        return counts_M

    def counting_rows(self, weights_M: Tensor | None) -> HeadRows:
        counts_M = self.counts(weights_M)
        if not self.is_counted_on_device:
            return keep_counting_rows(self.hidden_MD, self.targets_M, counts_M)
        max_rows = None if self.max_rows < 0 else self.max_rows
        return move_counting_rows_first(self.hidden_MD, self.targets_M, counts_M, None, max_rows)

    def open(
        self, rows: HeadRows, *, needs_dx: bool = False, dw_VD: Tensor | None = None, **options
    ) -> ChunkedHead:
        head = TorchHead if self.backend == "torch" else TritonHead
        temperature = rows.select(self.temperature_M, self.dtype)
        if temperature is not None and rows.active_M is not None:
            temperature = temperature.where(rows.active_M, 1)
        return head(
            rows,
            self.weight_VD,
            max(1, min(self.chunk_rows, len(rows))),
            temperature=self.temperature if temperature is None else temperature,
            group=self.group,
            needs_dx=needs_dx,
            dw_VD=dw_VD,
            **options,
        )

    def chunks(self, rows: HeadRows, with_gradient: bool) -> list[slice]:
        """The fused forward-only kernel keeps no logits, so it takes all rows at once."""
        if self.backend == "triton" and not with_gradient:
            return chunk_slices(len(rows), max(1, len(rows)))
        return chunk_slices(len(rows), self.chunk_rows, 128 if self.backend == "triton" else 32)

    def new_weight_gradient(self, wanted: bool) -> Tensor | None:
        if not wanted:
            return None
        return torch.zeros(self.weight_VD.shape, dtype=self.dtype, device=self.weight_VD.device)

    def close(self, head: ChunkedHead, rows: HeadRows) -> Tensor:
        """dX of this rank's rows in hidden's dtype; empty if it was not wanted."""
        head.finish()
        if head.dx_MD is None:
            return self.hidden_MD.new_empty(0)
        dx_MD = rows.expand(head.dx_MD).to(self.hidden_MD.dtype)
        if self.sequence_parallel and self.group is not None:
            dx_MD = dx_MD.chunk(self.group.size())[self.group.rank()].clone()
        return dx_MD
