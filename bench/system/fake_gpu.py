"""A GPU's branches on a machine without one: launches of a step recorded on fake tensors, or left out to time the host.

Fake tensors carry shapes, Triton launches are recorded, attention is one forward and one backward kernel.
"""

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from phimini.kernels.backend import launch
from phimini.parallel.attention import core
from phimini.parallel.megatron.builder import Model
from phimini.parallel.training import batch as transfer

VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "unsqueeze", "squeeze", "slice", "select", "detach", "alias", "expand", "permute",
    "as_strided", "split", "split_with_sizes", "unbind", "empty", "empty_like", "new_empty", "empty_strided", "lift_fresh",
    "_reshape_alias", "device", "scalar_tensor",
}  # fmt: skip


CHANGING = {"add_", "mul_", "masked_fill_", "index_add_"}


@dataclasses.dataclass(frozen=True, slots=True)
class Kernel:
    """One launch: its name, where in the step, the bytes of its tensors and the FLOPs of a product."""

    name: str
    part: str
    """layers, head, backward: where the step was; the head's own backward is in its forward"""
    bytes: int
    flops: int


class Recorder(TorchDispatchMode):
    """The launches of a step on fake tensors, and the bytes that it holds at once beside weights and gradients."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self.part = "layers"
        self.pageable = self.pinned = 0
        self.ended = False
        self._live: dict[int, int] = {}
        self._bytes = self.peak_bytes = 0
        for _, p in model.named_parameters():
            for tensor in (p, p.main_grad):  # pyright: ignore[reportAttributeAccessIssue]
                self._live[tensor.untyped_storage()._cdata] = 0

    def end(self, *_: Any, **__: Any) -> None:
        """Record no more."""
        self.ended = True

    def add(self, name: str, tensors: list[Tensor], flops: int = 0) -> None:
        storages = {x.untyped_storage()._cdata: x.nbytes for x in tensors}
        moved = sum(storages.values())
        if name == "_head_gradient_kernel":  # replaces the logits by their gradient
            moved += max(storages.values())
        elif name in CHANGING:  # its first tensor is read and written
            moved += tensors[0].nbytes
        elif name == "embedding":  # of the weight, the rows of the tokens
            moved = 2 * tensors[-1].nbytes
        self.kernels.append(Kernel(name, self.part, moved, flops))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [x for x in pytree.tree_leaves(out) if isinstance(x, FakeTensor)]
        for tensor in made:
            self._hold(tensor)
        name = func.name().split("::")[-1].split(".")[0]
        read = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if self.ended or name in VIEWS or not any(isinstance(x, FakeTensor) for x in read + made):
            return out
        if func.namespace in ("c10d", "_c10d_functional"):
            return out
        self.pageable += any(not isinstance(x, FakeTensor) and x.ndim for x in read)
        flops = 0
        if name in ("mm", "addmm"):
            a, b = args[:2] if name == "mm" else args[1:3]
            flops = 2 * a.shape[0] * a.shape[1] * b.shape[1]
        self.add(name, read + made, flops)
        return out

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._live:
            return
        self._live[key] = size
        self._bytes += size
        self.peak_bytes = max(self.peak_bytes, self._bytes)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._live.pop(key, None)
        self._bytes -= size


class _Flash(torch.autograd.Function):
    """One kernel forward and one backward, with the shapes of flash attention's results and without their values."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, flops: int, recorder: Recorder | None) -> Tensor:  # fmt: skip
        out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.counted = flops, recorder
        if recorder is not None:
            recorder.add("attention_fwd", [q, k, v, out, lse], flops)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flops, recorder = ctx.counted
        dq, dk, dv = (torch.empty_like(x) for x in ctx.saved_tensors[:3])
        if recorder is not None:
            tensors = [*grads, *ctx.saved_tensors, dq, dk, dv]
            recorder.add("attention_bwd", tensors, flops * 5 // 2)
        return dq, dk, dv, None, None


@contextlib.contextmanager
def as_on_a_gpu(fake: FakeTensorMode | None, recorder: Recorder | None) -> Iterator[None]:
    """Take the GPU's branches: of fake tensors, with a recorder, or of all tensors, to time the host."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, documents: core.PackedDocuments, _: float
    ) -> Tensor:
        lengths = [piece.query_end - piece.query_begin for piece in documents.pieces]
        flops = sum(2 * q.shape[1] * q.shape[2] * n * (n + 1) for n in lengths)
        return _Flash.apply(q, k, v, flops, recorder)  # pyright: ignore[reportReturnType]

    def launched(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if recorder is not None:
            values = [getattr(x, "base", x) for x in (*args, *kwargs.values())]
            recorder.add(kernel.__name__, [x for x in values if isinstance(x, Tensor)])

    def copied(pinned: Tensor, device: torch.device) -> Tensor:
        if recorder is None or fake is None:
            return pinned
        recorder.pinned += 1
        return fake.from_tensor(pinned)

    is_fake = lambda x: isinstance(x, FakeTensor)
    with (
        patch.object(launch, "stand_in", is_fake if fake is not None else lambda _: True),
        patch.object(core, "_attend_cuda", attend),
        patch.object(JITFunction, "run", launched),
        patch.object(transfer, "copy_beside", copied),
        patch.object(transfer, "pinned_buffer", lambda n: torch.empty(n, dtype=torch.uint8)),
    ):
        yield
