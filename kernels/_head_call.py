"""One call of a head op, in types a custom op can carry, and what it is turned into: rows, chunks, a back-end.

Custom ops carry tensors, numbers and names, not process groups: a group travels as its name.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from phimini.kernels._head_base import ChunkedHead
from phimini.kernels._head_rows import (
    CHUNK_BYTES,
    HeadRows,
    chunk_slices,
    compute_dtype,
    keep_counting_rows,
)
from phimini.kernels._head_torch import TorchHead


def name_of(group: dist.ProcessGroup | None) -> str:
    """'' for no group, or a group of one, which needs no communication."""
    return "" if group is None or group.size() == 1 else group.group_name


def group_of(name: str) -> dist.ProcessGroup | None:
    if not name:
        return None
    return distributed_c10d._resolve_process_group(name)  # pyright: ignore[reportPrivateImportUsage, reportArgumentType]


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
    backend: str
    """'torch' or 'triton'; '' for the device's default"""
    group: dist.ProcessGroup | None = field(init=False)

    def __post_init__(self) -> None:
        self.group = group_of(self.group_name)
        if self.sequence_parallel and self.group is not None:
            own_MD = self.hidden_MD.contiguous()
            self.hidden_MD = own_MD.new_empty(own_MD.shape[0] * self.group.size(), own_MD.shape[1])
            dist.all_gather_into_tensor(self.hidden_MD, own_MD, group=self.group)

    @property
    def dtype(self) -> torch.dtype:
        """of statistics, losses and dW"""
        return compute_dtype(self.weight_VD.dtype)

    @property
    def chunk_rows(self) -> int:
        """How many rows of logits the byte budget holds: at least 16."""
        is_cpu = self.weight_VD.device.type == "cpu"
        element_bytes = self.dtype.itemsize if is_cpu else self.weight_VD.itemsize
        budget = self.chunk_bytes or CHUNK_BYTES[self.weight_VD.device.type]
        return max(16, budget // (self.weight_VD.shape[0] * element_bytes))

    def counting_rows(self, weights_M: Tensor | None) -> HeadRows:
        num_classes = self.weight_VD.shape[0] * (1 if self.group is None else self.group.size())
        return keep_counting_rows(
            self.op, self.hidden_MD, self.targets_M, weights_M, self.ignore_index, num_classes
        )

    def chunks(self, rows: HeadRows) -> list[slice]:
        return chunk_slices(rows.targets_M.shape[0], self.chunk_rows)

    def open(
        self, rows: HeadRows, *, needs_dx: bool = False, dw_VD: Tensor | None = None, **options
    ) -> ChunkedHead:
        return TorchHead(
            rows,
            self.weight_VD,
            max(1, min(self.chunk_rows, rows.targets_M.shape[0])),
            temperature=self.temperature
            if self.temperature_M is None
            else rows.select(self.temperature_M),
            group=self.group,
            needs_dx=needs_dx,
            dw_VD=dw_VD,
            **options,
        )

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
