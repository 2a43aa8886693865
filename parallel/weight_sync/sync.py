"""Send weights from the trainer to the rollout engines and verify them, in vLLM's phases init, start, update, finish.

    pause -> start -> (gather -> pack -> update: transfer, load) per bucket -> finish: verify -> resume

The trainer streams whole tensors by their Hugging Face names and packs them into one bucket of fixed size (inproc
hands over as many tensors by reference). A transport carries the bucket (`cpu_transports.py`: inproc, shm, gloo;
`gpu_transports.py`: ipc, nccl). Peak extra memory of a trainer rank is two buckets: the bucket, and one tensor being
gathered.

Each tensor has a checksum that the engine's workers compare twice: with the bytes that arrived, before that bucket is
loaded, and with the model's weights after `finish` (`vllm_receiver.py`). A sync that fails before its first bucket is
loaded leaves the engine with its old weights, complete. After a later failure the engine refuses to sample until a
sync has succeeded, so it never samples from mixed weights. Every wait ends at the sync's deadline. An error names rank
or engine, tensor and phase.
"""

import dataclasses
import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from phimini.kernels import checksums
from phimini.model.config import ModelConfig
from phimini.parallel.megatron.weight_names import hf_names
from phimini.parallel.weight_sync.deadline import Receiver, Wait, Watchdog, WeightSyncError
from phimini.parallel.weight_sync.fp8_blocks import is_quantised, quantised_names, working_bytes

__all__ = ["Entry", "Receiver", "SyncReport", "Transport", "Wait", "WeightSync", "WeightSyncError"]

STILL_CACHED = 1 << 20
"""bytes that are still in the CPU's cache when their checksum is computed"""
ALIGNMENT = 16
"""bytes; tensors of a bucket start at multiples of it, so that any dtype can be viewed in place"""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a bucket."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """bytes from the bucket's start"""
    num_bytes: int
    checksum: int

    def view(self, bucket: Tensor) -> Tensor:
        """Return the tensor as a view of a bucket's bytes."""
        data = bucket[self.offset : self.offset + self.num_bytes]
        return data.view(getattr(torch, self.dtype)).view(self.shape)


def entry_of(fields: dict[str, Any]) -> Entry:
    """Return the Entry of fields that went through JSON."""
    return Entry(**{**fields, "shape": tuple(fields["shape"])})


def backend(transport: str) -> str:
    """Return our transport's name in vLLM's factory, which has an `ipc` and a `nccl` of its own."""
    return f"phimini-{transport}"


class Transport(Protocol):
    """Carries a bucket to the receivers."""

    name: str

    def open(self, receivers: Sequence[Receiver], info: dict[str, Any], wait: "Wait") -> None:
        """Run the init phase. `info` holds the fields that every receiver needs, with any transport."""
        ...

    def buffer(self) -> Tensor | None:
        """Return the bucket's bytes, to be filled before `send`, or None if tensors travel by reference."""
        ...

    def send(
        self,
        receivers: Sequence[Receiver],
        update: dict[str, Any],
        tensors: list[Tensor],
        wait: "Wait",
    ) -> None:
        """Run the update phase of one bucket; return once every receiver has loaded it. Raises WeightSyncError."""
        ...

    def close(self) -> None:
        """Release what `open` made."""
        ...


@dataclass
class SyncReport:
    """Seconds and bytes of one sync."""

    version: int
    transport: str
    tensors: int
    parameters: int
    bytes: int
    fingerprint: str
    """hash of all checksums, the same on the trainer and the engines"""
    gather_s: float = 0.0
    pack_s: float = 0.0
    """copies into the bucket; 0 if tensors travel by reference"""
    transfer_s: float = 0.0
    load_s: float = 0.0
    verify_s: float = 0.0
    """checksums on both sides, and the read-back, of the slowest worker"""
    checksum_s: float = 0.0
    """the part of verify_s for checksums of sent and of arrived bytes"""
    total_s: float = 0.0
    checksums: dict[str, int] = field(default_factory=dict, repr=False)


def smallest_bucket(
    config: ModelConfig, dtype: torch.dtype, *, merging: bool, fp8: bool = False
) -> dict[str, int]:
    """Return the bytes that a bucket needs for each tensor: the tensor, and the working memory of `to_hf` for it.

    Rows are passed on as they are. Interleaved q, k and v are copied twice, and tensor-parallel shards once more
    (merging). fp8: linear weights are quantised as well.
    """
    needed = {}
    for name, shape in hf_names(config).items():
        copies = 1 + merging
        if name.endswith("qkv_proj.weight"):
            copies = 2 + merging
        elif len(shape) == 1 or name.endswith(("embed_tokens.weight", "lm_head.weight")):
            copies = 1
        needed[name] = copies * math.prod(shape) * dtype.itemsize + ALIGNMENT
        if fp8 and is_quantised(name):
            needed[name] += working_bytes(shape)
    return needed


class WeightSync:
    """Sends the tensors of one model to engines; one object per sending rank.

    merging: the trainer is tensor parallel. fp8: the tensors come from `quantise_stream`. Raises ValueError if the
    bucket is smaller than `smallest_bucket`.
    """

    def __init__(
        self,
        config: ModelConfig,
        transport: Transport,
        receivers: Sequence[Receiver],
        *,
        bucket_bytes: int,
        deadline_s: float,
        dtype: torch.dtype = torch.float32,
        merging: bool = False,
        fp8: bool = False,
        where: str = "trainer rank 0",
        pause: str = "keep",
    ) -> None:
        self.config, self.transport, self.receivers = config, transport, list(receivers)
        self.bucket_bytes, self.deadline_s, self.where = bucket_bytes, deadline_s, where
        self._pause, self._fp8 = pause, fp8
        self.shapes = quantised_names(config) if fp8 else hf_names(config)
        smallest = smallest_bucket(config, dtype, merging=merging, fp8=fp8)
        if transport.buffer() is not None and bucket_bytes < max(smallest.values()):
            name = max(smallest, key=lambda name: smallest[name])
            raise ValueError(
                f"weight sync: bucket_bytes: {name} needs {smallest[name]} bytes while it is gathered, more than a "
                f"bucket of {bucket_bytes}"
            )
        self._open = False

    def sync(self, tensors: Iterator[tuple[str, Tensor]], version: int) -> SyncReport:
        """Send every tensor of the model. `tensors` may be collective and is exhausted even if the sync fails.

        Raises WeightSyncError. Its `whole` tells if the engines keep the old version or refuse to sample.
        """
        wait = Wait(self.deadline_s, self.where)
        try:
            with Watchdog(wait):
                return self._sync(tensors, version, wait)
        except WeightSyncError as error:
            # A second watchdog: the first has run out if an engine let the deadline pass.
            with Watchdog(wait):
                whole = self._abort()
                for _ in tensors:  # the other ranks are still gathering
                    pass
            raise WeightSyncError(**{**error.fields(), "whole": whole}) from error

    def set_receivers(self, receivers: Sequence[Receiver]) -> None:
        """Replace the receivers; the next sync reconnects to them."""
        if list(receivers) != self.receivers:
            self.receivers, self._open = list(receivers), False

    def close(self) -> None:
        """Close the transport."""
        self.transport.close()

    def _sync(self, tensors: Iterator[tuple[str, Tensor]], version: int, wait: Wait) -> SyncReport:
        started = time.perf_counter()
        if not self._open:
            info = {
                "config": dataclasses.asdict(self.config),
                "fp8": self._fp8,
                "deadline_s": self.deadline_s,
            }
            self.transport.open(self.receivers, info, wait)
            self._open = True
        wait.at("pause")
        wait.call(self.receivers, "pause", {"mode": self._pause})
        wait.at("start")
        wait.call(self.receivers, "start", {"version": str(version)})
        report = SyncReport(version, self.transport.name, 0, 0, 0, "")
        packer = _Packer(self, wait, report)
        for expected in (*self.shapes, None):
            pair = None  # the last tensor is gone before the next one is gathered
            wait.at("gather", expected)
            clock = time.perf_counter()
            pair = next(tensors, None)
            report.gather_s += time.perf_counter() - clock
            if (pair and pair[0]) != expected:
                got = "the end" if pair is None else pair[0]
                raise wait.error(f"expected {expected or 'the end'} from the trainer, got {got}")
            if pair is not None:
                packer.add(*pair)
        packer.flush()
        wait.at("finish")
        finished = wait.call(self.receivers, "finish", {"version": str(version)})
        wait.at("verify")
        self._verify(finished, report, wait)
        wait.call(self.receivers, "resume")
        report.fingerprint = fingerprint(report.checksums)
        report.total_s = time.perf_counter() - started
        return report

    def _verify(self, finished: list[list[dict[str, Any]]], report: SyncReport, wait: Wait) -> None:
        """Compare both sides' checksums, tensor by tensor, and report the seconds of the slowest worker."""
        for receiver, workers in zip(self.receivers, finished, strict=True):
            for worker in workers:
                where = f"{receiver.name}, {worker['where']}"
                for name, sent in report.checksums.items():
                    got = worker["checksums"].get(name)
                    if got != sent:
                        wait.at("verify", name)
                        raise wait.error(f"checksum {got}, the trainer's is {sent}", where)
        workers = [worker for workers in finished for worker in workers]
        keys = ("load_s", "verify_s", "checksum_s")
        slowest = {key: max(w[key] for w in workers) for key in keys}
        report.load_s = slowest["load_s"]
        report.transfer_s = max(0.0, report.transfer_s - slowest["load_s"] - slowest["verify_s"])
        report.verify_s += slowest["verify_s"]
        report.checksum_s += slowest["checksum_s"]

    def _abort(self) -> bool | None:
        """End the update at each engine that still answers. Return True if all kept their old weights, None if unknown."""
        self._open = False
        self.transport.close()
        wait = Wait(min(5.0, self.deadline_s), self.where)
        whole: bool | None = True
        for receiver in self.receivers:
            try:
                workers = wait.call([receiver], "abort")[0]
            except WeightSyncError:
                whole = None
                continue
            if whole is not None:
                whole = whole and all(worker["whole"] for worker in workers)
        return whole


def fingerprint(checksums: dict[str, int]) -> str:
    """Return 16 hex digits that identify a whole set of weights."""
    lines = "\n".join(f"{name} {value}" for name, value in sorted(checksums.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


class _Packer:
    """Fills the transport's buffer with tensors and sends it before a tensor that would not fit."""

    def __init__(self, sync: WeightSync, wait: Wait, report: SyncReport) -> None:
        self.sync, self.wait, self.report = sync, wait, report
        self.buffer = sync.transport.buffer()
        self.entries: list[tuple[str, Tensor, int]] = []
        """name, tensor or its copy, offset"""
        self.sums: list[int] = []
        """checksums of the first entries"""
        self.used, self.summed, self.number = 0, 0, 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Copy a tensor into the bucket, after sending the bucket if it is full."""
        sync, report = self.sync, self.report
        if tuple(tensor.shape) != sync.shapes.get(name):
            raise self.wait.error(
                f"{name} has shape {tuple(tensor.shape)}, expected {sync.shapes.get(name)}"
            )
        num_bytes = tensor.numel() * tensor.element_size()
        if self.used + num_bytes > sync.bucket_bytes:
            self.flush()
        self.wait.at("pack", name)
        clock = time.perf_counter()
        if self.buffer is not None:
            place = self.buffer[self.used : self.used + num_bytes]
            tensor = place.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        report.pack_s += time.perf_counter() - clock
        self.entries.append((name, tensor, self.used))
        self.used += num_bytes + -num_bytes % ALIGNMENT
        if tensor.is_cpu and self.used - self.summed >= STILL_CACHED:
            self.sum()

    def sum(self) -> None:
        """Compute the missing checksums in one call: in single calls the code would have left the cache each time."""
        clock = time.perf_counter()
        self.sums += checksums([tensor for _, tensor, _ in self.entries[len(self.sums) :]])
        self.summed = self.used
        spent = time.perf_counter() - clock
        self.report.checksum_s += spent
        self.report.verify_s += spent

    def flush(self) -> None:
        """Send the bucket, if it holds tensors, and empty it."""
        if not self.entries:
            return
        sync, report, wait = self.sync, self.report, self.wait
        wait.at("pack", self.entries[0][0])
        self.sum()
        entries = [
            Entry(
                name,
                str(t.dtype).removeprefix("torch."),
                tuple(t.shape),
                offset,
                t.numel() * t.element_size(),
                value,
            )
            for (name, t, offset), value in zip(self.entries, self.sums, strict=True)
        ]
        end = entries[-1].offset + entries[-1].num_bytes
        update = {
            "bucket": self.number,
            "num_bytes": end,
            "entries": [dataclasses.asdict(entry) for entry in entries],
        }
        wait.at("transfer", entries[0].name)
        clock = time.perf_counter()
        sync.transport.send(sync.receivers, update, [t for _, t, _ in self.entries], wait)
        report.transfer_s += time.perf_counter() - clock
        report.tensors += len(entries)
        report.parameters += sum(t.numel() for _, t, _ in self.entries)
        report.bytes += sum(entry.num_bytes for entry in entries)
        report.checksums.update({entry.name: entry.checksum for entry in entries})
        self.entries, self.sums, self.used, self.summed = [], [], 0, 0
        self.number += 1
