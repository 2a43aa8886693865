"""Peak memory of a stretch of code: by allocations, or by the resident set for memory that is not torch's."""

import ctypes
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_STATUS = Path("/proc/self/status")


class AllocationMeter(TorchDispatchMode):
    """Count the live bytes of the tensors that this thread makes within the block, on any device.

    Exact where a resident set is noise: a tiny model's step needs less than an allocator keeps for itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        given = {id_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and id_of(t) not in given and id_of(t) not in self._known:
                storage, key = t.untyped_storage(), id_of(t)
                self._known.add(key)
                self.live_bytes += storage.nbytes()
                self.peak_bytes = max(self.peak_bytes, self.live_bytes)
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        return result

    def _freed(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live_bytes -= num_bytes


def id_of(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def peak_rss_bytes() -> int | None:
    """Return the largest resident set of this process so far; None where the system does not report it."""
    return _resident_bytes("VmHWM") if _STATUS.exists() else None


def peak_allocated_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return the bytes that `run()` allocates through torch at its peak, beyond those allocated before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with AllocationMeter() as meter:
        run()
    return meter.peak_bytes


def peak_extra_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Return the bytes that `run()` needs at its peak, libraries other than torch included; None where unknown.

    From torch's allocator on CUDA, else from the resident set.
    """
    if device.type == "cuda":
        return peak_allocated_bytes(run, device)
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that glibc keeps would hide the next growth
    reset.write_text("5")  # resets the peak of the resident set (Linux, man 5 proc)
    before = _resident_bytes("VmRSS")
    run()
    return max(0, _resident_bytes("VmHWM") - before)


def _resident_bytes(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")
