"""Transports of a bucket on GPUs: CUDA IPC to engines on the same machine, NCCL to any other. Both sides.

| transport | data that travels                                                             | on a CPU          |
|-----------|-------------------------------------------------------------------------------|-------------------|
| ipc       | a handle of the bucket's memory, once; workers read it in place               | shm               |
| nccl      | a broadcast by vLLM's NCCL communicator, the group that its own `nccl` makes  | gloo              |

vLLM's own engines of these names have no checksum, deadline or version; ours use the same bucket and the same checks as
on a CPU. NCCL refuses two ranks on one GPU, and IPC needs a GPU that both processes see.

Not run on a GPU yet. Tests run both against the real vLLM with CUDA's part replaced (`bucket_handle`, `open_bucket`,
`unique_id`, `communicator`, `on_device`), and bind the calls below to the installed signatures of torch and vLLM.
"""

import base64
import inspect
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from phimini.parallel.weight_sync.cpu_transports import Fields, first_line, meet, send_to_all
from phimini.parallel.weight_sync.deadline import Receiver, Wait

T = TypeVar("T")
_BYTES = ("storage_handle", "ref_counter_handle", "event_handle")
_NUMBERS = ("storage_size_bytes", "storage_offset_bytes", "ref_counter_offset", "event_sync_required")  # fmt: skip
_EXPANDABLE = re.compile(r"expandable_segments\s*:\s*(True|1)\b", re.IGNORECASE)


class Late(RuntimeError):
    """Work on a GPU that did not end in time."""


# --- the trainer's side ----------------------------------------------------------------------------
class IpcTransport:
    """One bucket of GPU memory that every worker of this machine maps."""

    name = "ipc"

    def __init__(self, bucket_bytes: int, *, workers_per_engine: int = 1) -> None:
        self._buffer = shareable(bucket_bytes)
        self._workers = workers_per_engine

    def open(self, receivers: Sequence[Receiver], info: Fields, wait: Wait) -> None:
        wait.at("init")
        futures = []
        for receiver in receivers:
            # An exported handle counts one reader: each worker gets its own.
            handles = [bucket_handle(self._buffer) for _ in range(self._workers)]
            futures += wait.start([receiver], "init", info | {"link": {"handles": handles}})
        wait.answers(receivers, futures)

    def buffer(self) -> Tensor | None:
        return self._buffer

    def send(
        self, receivers: Sequence[Receiver], update: Fields, tensors: list[Tensor], wait: Wait
    ) -> None:
        try:
            finish(self._buffer.device, wait.remaining_s)  # the copies into the bucket
        except Late as error:
            raise wait.error(str(error)) from error
        wait.call(receivers, "update", update)

    def close(self) -> None:
        pass


class NcclTransport:
    """A broadcast from the trainer to every worker of every engine, in a separate NCCL communicator."""

    name = "nccl"

    def __init__(self, bucket_bytes: int, *, workers_per_engine: int = 1) -> None:
        self._buffer = torch.empty(bucket_bytes, dtype=torch.uint8, device=on_device())
        self._workers = workers_per_engine
        self._communicator: Any = None

    def open(self, receivers: Sequence[Receiver], info: Fields, wait: Wait) -> None:
        wait.at("init")
        size = 1 + self._workers * len(receivers)
        try:
            link = {"id": base64.b64encode(unique_id()).decode(), "size": size}
        except (RuntimeError, OSError) as error:
            raise wait.error(f"NCCL could not be loaded: {first_line(error)}") from error
        self._communicator = meet(
            receivers, info, link, self._workers, wait,
            lambda: communicator_within(link, 0, wait.remaining_s),
        )  # fmt: skip

    def buffer(self) -> Tensor | None:
        return self._buffer

    def send(
        self, receivers: Sequence[Receiver], update: Fields, tensors: list[Tensor], wait: Wait
    ) -> None:
        joined, data = self._communicator, self._buffer[: update["num_bytes"]]
        assert joined is not None, "open comes first"
        send_to_all(receivers, update, wait, lambda: broadcast(joined, data, wait.remaining_s))

    def close(self) -> None:
        if self._communicator is not None:
            self._communicator.destroy()  # aborts running work, in a separate thread
            self._communicator = None


# --- both sides ------------------------------------------------------------------------------------
def on_device() -> torch.device:
    """Return this thread's current GPU."""
    return torch.device("cuda", torch.cuda.current_device())


def expandable_segments() -> str:
    """Return torch's allocator settings if they turn on expandable segments, which have no CUDA IPC handle, else ""."""
    settings = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    return settings if _EXPANDABLE.search(settings) else ""


def shareable(num_bytes: int) -> Tensor:
    """Return bytes on this thread's GPU, in memory that other processes of the machine can map.

    For an expandable segment torch passes file descriptors, which the reader takes by pidfd_getfd; Yama and most
    containers forbid that (pytorch issue 165685). Memory allocated while the setting is off is in an ordinary segment.
    """
    settings = expandable_segments()
    if settings:
        set_allocator(_EXPANDABLE.sub("expandable_segments:False", settings))
    try:
        return torch.empty(num_bytes, dtype=torch.uint8, device=on_device())
    finally:
        if settings:
            set_allocator(settings)


def set_allocator(settings: str) -> None:
    """Set all settings of torch's allocator; settings that are left out go back to their defaults."""
    torch._C._accelerator_setAllocatorSettings(settings)  # pyright: ignore[reportAttributeAccessIssue]


def communicator_within(link: Fields, rank: int, timeout_s: float) -> Any:
    """Return `communicator` on this thread's GPU. Raises Late."""
    device = on_device()  # in this thread: in a new one CUDA's current GPU is number 0
    return within(lambda: communicator(link, rank, device), timeout_s)


def unique_id() -> bytes:
    """Return a new NCCL id, which also has the address of this process's NCCL. Raises RuntimeError or OSError without NCCL."""
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

    return bytes(NCCLLibrary().ncclGetUniqueId().internal)


def communicator(link: Fields, rank: int, device: torch.device) -> Any:
    """Join the group of the trainer (rank 0) and all workers. Raises RuntimeError if NCCL is missing.

    The id came with the link, so nothing is read from a store, where vLLM's other way would unpickle it.
    """
    from vllm.distributed.weight_transfer.nccl_common import uid_init_process_group

    joined = uid_init_process_group(base64.b64decode(link["id"]), rank, link["size"], device)
    if joined.disabled:  # without NCCL vLLM's communicator silently does nothing
        raise RuntimeError("NCCL is turned off")
    return joined


def broadcast(joined: Any, data: Tensor, timeout_s: float) -> None:
    """Broadcast from rank 0. Raises Late if it does not end in time: the other side is gone, or slow."""
    joined.broadcast(data, src=0)
    finish(data.device, timeout_s)


def finish(device: torch.device, timeout_s: float) -> None:
    """Wait for the device's current stream. Raises Late."""
    if device.type != "cuda":
        return
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    end = time.monotonic() + timeout_s
    while not event.query():
        if time.monotonic() > end:
            raise Late(f"the GPU's work did not end within {timeout_s:.3g} s")
        time.sleep(2e-4)


def within(action: Callable[[], T], timeout_s: float) -> T:
    """Run `action` in a thread, which is abandoned when it is late. Raises Late, or the error of `action`."""
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(action())
        except (RuntimeError, OSError, ValueError) as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if errors:
        raise errors[0]
    if not results:
        raise Late(f"the other side did not join within {timeout_s:.3g} s")
    return results[0]


def bucket_handle(buffer: Tensor) -> dict[str, Any]:
    """Return CUDA's handle of a buffer in JSON's types, with its GPU, for one reader."""
    from torch.multiprocessing.reductions import reduce_tensor

    parts: Any = reduce_tensor(buffer)[1]
    fields = dict(zip(_parameters(), parts, strict=True))
    gpu = str(torch.cuda.get_device_properties(buffer.device).uuid)
    return {
        "gpu": gpu,
        "num_bytes": buffer.numel(),
        **{name: base64.b64encode(fields[name]).decode() for name in _BYTES},
        **{name: fields[name] for name in _NUMBERS},
    }


def open_bucket(handle: dict[str, Any]) -> Tensor:
    """Map a buffer of another process. Raises RuntimeError if this process does not see its GPU."""
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    gpus = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    if handle["gpu"] not in gpus:
        raise RuntimeError(f"the bucket is on GPU {handle['gpu']}, this process sees {gpus}")
    fixed = {
        "tensor_cls": Tensor,
        "tensor_size": (handle["num_bytes"],),
        "tensor_stride": (1,),
        "tensor_offset": 0,
        "storage_cls": torch.storage.TypedStorage,
        "dtype": torch.uint8,
        "storage_device": gpus.index(handle["gpu"]),
        "requires_grad": False,
    }
    sent = {name: base64.b64decode(handle[name]) for name in _BYTES}
    fields = fixed | sent | {name: handle[name] for name in _NUMBERS}
    return rebuild_cuda_tensor(*(fields[name] for name in _parameters()))


def _parameters() -> list[str]:
    """Return the names of the fields of torch's handles, in order."""
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    return list(inspect.signature(rebuild_cuda_tensor).parameters)
