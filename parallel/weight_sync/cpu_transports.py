"""Transports of a bucket on CPUs: the trainer's side, and functions that both sides use.

| transport | engine                     | data that travels                               | on a GPU          |
|-----------|----------------------------|-------------------------------------------------|-------------------|
| inproc    | in the trainer's process   | a reference to the tensor                       | inproc            |
| shm       | a process of this machine  | bytes in shared memory, one segment of a bucket | ipc               |
| gloo      | on any machine             | a broadcast in a separate process group         | nccl              |
"""

import itertools
import mmap
import os
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._distributed_c10d import BroadcastOptions, PrefixStore, TCPStore
from torch.distributed import ProcessGroupGloo

from phimini.parallel.weight_sync.deadline import Receiver, Wait

T = TypeVar("T")
Fields = dict[str, Any]
IN_THIS_PROCESS: dict[int, list[Tensor]] = {}
"""inproc: the tensors of the current update, by the transport's number"""
_numbers = itertools.count()
SEGMENT = "phimini-weights"
"""shm: the segment's name in the kernel's lists"""


class InprocTransport:
    """Hands tensors by reference to an engine in the trainer's process."""

    name = "inproc"

    def __init__(self) -> None:
        self._key = next(_numbers)

    def open(self, receivers: Sequence[Receiver], info: Fields, wait: Wait) -> None:
        wait.at("init")
        wait.call(receivers, "init", info | {"link": {"key": self._key}})

    def buffer(self) -> Tensor | None:
        return None

    def send(
        self, receivers: Sequence[Receiver], update: Fields, tensors: list[Tensor], wait: Wait
    ) -> None:
        IN_THIS_PROCESS[self._key] = tensors
        try:
            wait.call(receivers, "update", update)
        finally:
            del IN_THIS_PROCESS[self._key]

    def close(self) -> None:
        pass


class ShmTransport:
    """Shared memory: one segment that every worker of this machine maps."""

    name = "shm"

    def __init__(self, bucket_bytes: int) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._bucket_bytes = bucket_bytes

    def open(self, receivers: Sequence[Receiver], info: Fields, wait: Wait) -> None:
        wait.at("init")
        # A file without a name disappears with its processes.
        handle = os.memfd_create(SEGMENT)
        try:
            os.ftruncate(handle, self._bucket_bytes)
            self._buffer = map_segment(os.getpid(), handle, self._bucket_bytes)
            link = {"pid": os.getpid(), "descriptor": handle, "num_bytes": self._bucket_bytes}
            wait.call(receivers, "init", info | {"link": link})
        finally:
            os.close(handle)  # the mappings stay

    def buffer(self) -> Tensor | None:
        return self._buffer

    def send(
        self, receivers: Sequence[Receiver], update: Fields, tensors: list[Tensor], wait: Wait
    ) -> None:
        wait.call(receivers, "update", update)

    def close(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)


def map_segment(pid: int, descriptor: int, num_bytes: int) -> Tensor:
    """Map a transport's segment, which is open in a process of this machine, as bytes.

    Raises OSError if it is not open there, ValueError for any other file: the numbers came over the network.
    """
    handle = os.open(f"/proc/{pid:d}/fd/{descriptor:d}", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        name = os.readlink(f"/proc/self/fd/{handle}")
        if not name.startswith(f"/memfd:{SEGMENT} "):
            raise ValueError(
                f"descriptor {descriptor} of process {pid} is no segment of weights: {name}"
            )
        return torch.frombuffer(mmap.mmap(handle, num_bytes), dtype=torch.uint8)
    finally:
        os.close(handle)


class GlooTransport:
    """A broadcast from the trainer to every worker of every engine, in a separate process group."""

    name = "gloo"

    def __init__(
        self, bucket_bytes: int, *, host: str = "127.0.0.1", workers_per_engine: int = 1
    ) -> None:
        self._buffer = torch.empty(bucket_bytes, dtype=torch.uint8)
        self._host, self._workers = host, workers_per_engine
        self._group: ProcessGroupGloo | None = None
        self._store: TCPStore | None = None

    def open(self, receivers: Sequence[Receiver], info: Fields, wait: Wait) -> None:
        wait.at("init")
        size = 1 + self._workers * len(receivers)
        self._store = store = store_at(self._host, wait.remaining_s)
        link = {"host": self._host, "port": store.port, "size": size}
        self._group = meet(
            receivers, info, link, self._workers, wait,
            lambda: gloo_group(store, 0, size, wait.remaining_s, self._host),
        )  # fmt: skip

    def buffer(self) -> Tensor | None:
        return self._buffer

    def send(
        self, receivers: Sequence[Receiver], update: Fields, tensors: list[Tensor], wait: Wait
    ) -> None:
        group, data = self._group, self._buffer[: update["num_bytes"]]
        assert group is not None, "open comes first"
        send_to_all(receivers, update, wait, lambda: broadcast(group, data, wait.remaining_s))

    def close(self) -> None:
        self._group, self._store = None, None


def meet(
    receivers: Sequence[Receiver],
    info: Fields,
    link: Fields,
    workers: int,
    wait: Wait,
    join: Callable[[], T],
) -> T:
    """Send every engine its workers' first rank in the transport's group, and join as rank 0. Raises WeightSyncError."""
    futures = []
    for i, receiver in enumerate(receivers):
        first = {"first_rank": 1 + i * workers}
        futures += wait.start([receiver], "init", info | {"link": link | first})
    try:
        joined = join()
    except RuntimeError as error:
        wait.answers(receivers, futures)  # an engine's own error is more precise
        raise wait.error(f"the group: {first_line(error)}") from error
    wait.answers(receivers, futures)
    return joined


def send_to_all(
    receivers: Sequence[Receiver], update: Fields, wait: Wait, send: Callable[[], None]
) -> None:
    """Announce a bucket, send it, and wait until it is loaded. Raises WeightSyncError."""
    futures = wait.start(receivers, "update", update)
    try:
        send()
    except RuntimeError as error:
        for future in futures:  # a worker's own error, if there is one, is more precise
            end = time.monotonic() + min(1.0, wait.remaining_s)
            while not future.done() and time.monotonic() < end:
                time.sleep(0.01)
        done = [(r, f) for r, f in zip(receivers, futures, strict=True) if f.done()]
        wait.answers([r for r, _ in done], [f for _, f in done])
        raise wait.error(f"the broadcast: {first_line(error)}") from error
    wait.answers(receivers, futures)


def store_at(host: str, timeout_s: float) -> TCPStore:
    """Return a store that listens at `host` only; torch's own socket would listen at every address of the machine."""
    listening = socket.create_server((host, 0))
    port, timeout = listening.getsockname()[1], timedelta(seconds=timeout_s)
    return TCPStore(
        host, port, None, is_master=True, wait_for_workers=False, timeout=timeout,
        master_listen_fd=listening.detach(),  # the store closes it
    )  # fmt: skip


def join_gloo(link: Fields, worker: int, timeout_s: float) -> ProcessGroupGloo:
    """Join the trainer's group as a worker, at this machine's address towards the trainer."""
    timeout = timedelta(seconds=timeout_s)
    with socket.create_connection((link["host"], link["port"]), timeout_s) as connection:
        here = connection.getsockname()[0]
    store = TCPStore(link["host"], link["port"], None, is_master=False, timeout=timeout)
    return gloo_group(store, link["first_rank"] + worker, link["size"], timeout_s, here)


def gloo_group(
    store: TCPStore, rank: int, size: int, timeout_s: float, host: str
) -> ProcessGroupGloo:
    """Return a gloo group over `store`, whose own sockets listen at `host` only."""
    options: Any = ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
    options._devices = [ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timedelta(seconds=timeout_s)
    return ProcessGroupGloo(PrefixStore("phimini-weights", store), rank, size, options)


def broadcast(group: ProcessGroupGloo, data: Tensor, timeout_s: float) -> None:
    """Broadcast from rank 0. Raises RuntimeError if the other side is gone, or later than `timeout_s`."""
    options = BroadcastOptions()
    options.rootRank = 0
    options.timeout = timedelta(seconds=timeout_s)
    group.broadcast([data], options).wait()  # pyright: ignore[reportAttributeAccessIssue]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
