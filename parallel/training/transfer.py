"""Copy of a micro-batch to the GPU that neither waits for it nor makes it wait.

A copy from pageable memory stops the host until the GPU's queue has drained. So all tensors of a micro-batch go into one
pinned buffer, which a side stream copies while the compute stream still works on earlier micro-batches.
"""

import functools
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from phimini.kernels.backend import launch

T = TypeVar("T")
ALIGNMENT = 256
"""bytes between the starts of two tensors in the buffer, as the GPU's own allocations"""
KEPT_ON_HOST = ("cu_seqlens", "rows")
"""fields of any dataclass that the host goes on reading"""


def to_device(value: T, device: torch.device) -> T:
    """Return `value` with its tensors on `device`, but KEPT_ON_HOST: dataclasses, dicts, lists and tuples are searched.

    On a CPU nothing is copied. Tensors that are on the GPU already stay as they are.
    """
    if device.type == "cpu" and launch.stand_in is None:
        return value
    host: list[Tensor] = []
    mapped(host.append, value)
    if not host:
        return value
    starts, num_bytes = [], 0
    for tensor in host:
        starts.append(num_bytes)
        num_bytes += tensor.nbytes + -tensor.nbytes % ALIGNMENT
    pinned = pinned_buffer(num_bytes)
    parts = list(zip(starts, host, strict=True))
    for start, tensor in parts:
        _part(pinned, start, tensor).copy_(tensor)
    buffer = copy_beside(pinned, device)
    moved = iter([_part(buffer, start, tensor) for start, tensor in parts])
    return mapped(lambda _: next(moved), value)


def mapped(fn: Callable[[Tensor], Any], value: Any) -> Any:
    """Return `value` with `fn` applied, in a fixed order, to its tensors that are not on a GPU."""
    if isinstance(value, Tensor):
        return value if launch.on_gpu(value) else fn(value)
    if isinstance(value, dict):
        return {key: mapped(fn, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(mapped(fn, item) for item in value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    changed = {
        f.name: mapped(fn, getattr(value, f.name))
        for f in fields(value)
        if f.name not in KEPT_ON_HOST
    }
    return _replaced(value, changed)


def _replaced(value: Any, changed: dict[str, Any]) -> Any:
    copy = object.__new__(type(value))
    for f in fields(value):  # frozen or not, and without running __post_init__ a second time
        object.__setattr__(copy, f.name, changed.get(f.name, getattr(value, f.name)))
    return copy


def _part(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)


def pinned_buffer(num_bytes: int) -> Tensor:
    """Return page-locked memory; torch reuses it once the copies from it are done."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


@functools.cache
def _side_stream(device: torch.device) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)


def copy_beside(pinned: Tensor, device: torch.device) -> Tensor:
    """Copy on a side stream. What the current stream gets to do from now on waits for the copy, the host does not."""
    stream, current = _side_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        buffer = pinned.to(device, non_blocking=True)
    current.wait_stream(stream)
    buffer.record_stream(current)
    return buffer
