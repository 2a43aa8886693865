"""A stand-in for a GPU on CPU tensors: it follows which tensors a GPU would hold, and raises where the host would wait.

    with DeviceStandIn(model) as device:
        start_step(model, microbatches, head)
    device.copies

Parameters and gradients are the GPU's, and so is all that is computed from them. Micro-batches, and tensors made from
Python numbers, are the host's. Tensors of `torch.zeros` and its like belong to whichever they first meet. The pinned copies
of `batch.py` are the only way from the host to the GPU. Triton kernels and attention do nothing: values mean nothing.
"""

from collections.abc import Iterable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from phimini.kernels.backend import cpu_gemm, launch
from phimini.kernels.head import triton_backend
from phimini.parallel.attention import blocks, core
from phimini.parallel.training import batch as transfer

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten._unique2, aten.unique_dim,
    aten.bincount,
}  # fmt: skip
READS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.item}
FROM_NUMBERS = {torch.tensor, torch.as_tensor, torch.from_numpy}


class HostWaitsError(AssertionError):
    """Error for a call that stops the host until the GPU's queue has drained, or that a GPU would refuse."""


class _Storages:
    def __init__(self) -> None:
        self._refs: dict[int, StorageWeakRef] = {}

    def add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        self._refs[storage._cdata] = StorageWeakRef(storage)

    def __contains__(self, x: Tensor) -> bool:
        ref = self._refs.get(x.untyped_storage()._cdata)
        return ref is not None and not ref.expired()


class DeviceStandIn(TorchDispatchMode):
    """See the module. `copies`: bytes of each copy to the GPU."""

    def __init__(self, on_device: Iterable[Tensor], on_host: Iterable[Tensor]) -> None:
        super().__init__()
        self.device, self.host, self.pinned = _Storages(), _Storages(), _Storages()
        for tensor in on_device:
            self.device.add(tensor)
        for tensor in on_host:
            self.host.add(tensor)
        self.copies: list[int] = []
        self._patches = [
            patch.object(launch, "stand_in", self.holds),
            # CPU products do not widen their results
            patch.object(cpu_gemm, "on_gpu", lambda _: False),
            patch.object(
                triton_backend.TritonHead,
                "on_gpu",
                property(lambda _: False, lambda *_: None),
                create=True,
            ),
            patch.object(core, "_attend_cuda", lambda q, k, v, *_: q + 0 * (k.sum() + v.sum())),
            patch.object(core, "kernel_for", lambda _: blocks.CPU),
            patch.object(transfer, "pinned_buffer", self._pinned_buffer),
            patch.object(transfer, "copy_beside", self._copy),
            patch("triton.runtime.interpreter.GridExecutor.__call__", self._launch),
        ]
        self._reads = _Reads(self)

    def holds(self, x: Tensor) -> bool:
        return x in self.device

    def __enter__(self) -> "DeviceStandIn":
        for some in self._patches:
            some.start()
        self._reads.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._reads.__exit__(*exception)
        for some in self._patches:
            some.stop()

    def _launch(self, *args: Any, **kwargs: Any) -> None:
        """Stand for the launch of a Triton kernel, which reads and writes its arguments on the GPU."""
        values = [
            getattr(x, "base", x) for x in (*args, *kwargs.values())
        ]  # of a tensor descriptor
        tensors = [x for x in values if isinstance(x, Tensor)]
        if any(x in self.host for x in tensors):
            raise HostWaitsError("a Triton kernel of a tensor on the host")
        for tensor in tensors:
            self.device.add(tensor)

    def _pinned_buffer(self, num_bytes: int) -> Tensor:
        buffer = torch.zeros(num_bytes, dtype=torch.uint8)
        self.pinned.add(buffer)
        return buffer

    def _copy(self, pinned: Tensor, device: torch.device) -> Tensor:
        if pinned not in self.pinned:
            raise HostWaitsError("a copy from pageable memory")
        self.copies.append(pinned.nbytes)
        buffer = pinned.clone()
        self.device.add(buffer)
        return buffer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        ours = [x for x in tensors if x in self.device]
        by_mask = func.overloadpacket in (aten.index, aten.index_put_) and any(
            x.dtype == torch.bool for x in pytree.tree_leaves(args[1]) if isinstance(x, Tensor)
        )
        if ours and (func.overloadpacket in WAITS or by_mask):
            raise HostWaitsError(f"{func} of a tensor on the GPU")
        theirs = [x for x in tensors if x in self.host and x.ndim]
        if ours and theirs:
            raise HostWaitsError(
                f"{func} of tensors on the GPU and on the host, {tuple(theirs[0].shape)}"
            )
        out = func(*args, **(kwargs or {}))
        made = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        if ours:
            for x in [*tensors, *made]:
                if x.ndim or x not in self.host:
                    self.device.add(x)
        elif any(x in self.host for x in tensors):
            for x in made:
                if x not in self.pinned:
                    self.host.add(x)
        return out


class _Reads(TorchFunctionMode):
    """Calls that read a tensor without an operator, and tensors made from Python numbers."""

    def __init__(self, device: DeviceStandIn) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS and args[0] in self._device.device:
            raise HostWaitsError(f"{func.__name__} of a tensor on the GPU")
        out = func(*args, **(kwargs or {}))
        if func in FROM_NUMBERS:
            self._device.host.add(out)
        return out
