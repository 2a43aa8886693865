"""Weights from the trainer to the rollout engines, with proof: vLLM's four phases init, start, update, finish.

    pause -> start -> (gather -> pack -> update: transfer, load) per bucket -> finish: verify -> resume

The trainer streams whole tensors by their Hugging Face names and packs them into one bucket of fixed size (inproc
hands over as many by reference); how a bucket travels is the transport's business (`cpu_transports.py`: inproc, shm, gloo; `gpu_transports.py`:
ipc and nccl). Peak extra memory of a trainer rank is two buckets: the bucket, and one tensor being gathered.

Every tensor carries a checksum that the engine's workers compare twice: with the bytes that arrived, before anything
of that bucket is loaded, and with what stands in the model after `finish` (`vllm_receiver.py`). A sync that
fails before its first bucket is loaded leaves the engine on its old version, whole; a later failure leaves it
refusing to sample until a whole sync has succeeded. Nothing is ever sampled from mixed weights.
Every wait has the sync's deadline; an error names rank or engine, tensor and phase.
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
"""bytes that a CPU has just written and still holds when it sums them"""
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
        """The tensor within a bucket's bytes, without a copy."""
        data = bucket[self.offset : self.offset + self.num_bytes]
        return data.view(getattr(torch, self.dtype)).view(self.shape)


def entry_of(fields: dict[str, Any]) -> Entry:
    return Entry(**{**fields, "shape": tuple(fields["shape"])})


class Transport(Protocol):
    """How a bucket gets to the receivers."""

    name: str

    def open(self, receivers: Sequence[Receiver], info: dict[str, Any], wait: "Wait") -> None:
        """The init phase; `info` is what every receiver needs whatever the transport."""
        ...

    def buffer(self) -> Tensor | None:
        """The bucket's bytes, to be filled before `send`; None if tensors travel by reference."""
        ...

    def send(
        self,
        receivers: Sequence[Receiver],
        update: dict[str, Any],
        tensors: list[Tensor],
        wait: "Wait",
    ) -> None: ...

    def close(self) -> None: ...


@dataclass
class SyncReport:
    """Seconds and bytes of one sync; equal to a row of `bench weight-sync` but for layout."""

    version: int
    transport: str
    tensors: int
    parameters: int
    bytes: int
    fingerprint: str
    """of the trainer's tensors, and so of the engines'"""
    gather_s: float = 0.0
    pack_s: float = 0.0
    """copies into the bucket, or nothing where tensors travel by reference"""
    transfer_s: float = 0.0
    load_s: float = 0.0
    verify_s: float = 0.0
    """checksums on both sides, the engines' slowest worker, and what it then reads back"""
    checksum_s: float = 0.0
    """of verify_s, what checksums of sent and of arrived bytes take"""
    total_s: float = 0.0
    checksums: dict[str, int] = field(default_factory=dict, repr=False)


def smallest_bucket(
    config: ModelConfig, dtype: torch.dtype, *, merging: bool, fp8: bool = False
) -> dict[str, int]:
    """Bytes that the bucket must have for each tensor: itself, and what `to_hf` needs while it puts it together.

    Rows come out as they are; interleaved q, k and v are copied twice; tensor-parallel shards once more (merging).
    fp8: linear weights are quantised on the way.
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
    """Brings tensors of one model to engines; one per sending rank.

    merging: the trainer is tensor parallel. fp8: what it sends is a `quantise_stream`. Raises ValueError if the bucket is smaller than `smallest_bucket`.
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
        """Sends every tensor of the model; `tensors` may be collective and is exhausted even if the sync fails.

        Raises WeightSyncError; the engines then keep the old version or refuse to sample (`.whole`).
        """
        wait = Wait(self.deadline_s, self.where)
        try:
            with Watchdog(wait):
                return self._sync(tensors, version, wait)
        except WeightSyncError as error:
            # Anew: that an engine let the deadline pass is not this rank's fault.
            with Watchdog(wait):
                whole = self._abort()
                for _ in tensors:  # the other ranks are still gathering
                    pass
            raise WeightSyncError(**{**error.fields(), "whole": whole}) from error

    def set_receivers(self, receivers: Sequence[Receiver]) -> None:
        """The engines that are left; the next sync makes their acquaintance."""
        if list(receivers) != self.receivers:
            self.receivers, self._open = list(receivers), False

    def close(self) -> None:
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
        """Both sides' checksums, tensor by tensor; and the seconds that the slowest worker spent."""
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
        """Ends the update at every engine that still answers; whether all of them kept their old weights."""
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
    """16 hex digits for a whole set of weights."""
    lines = "\n".join(f"{name} {value}" for name, value in sorted(checksums.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


class _Packer:
    """Fills the transport's buffer with tensors and sends it when the next one would not fit."""

    def __init__(self, sync: WeightSync, wait: Wait, report: SyncReport) -> None:
        self.sync, self.wait, self.report = sync, wait, report
        self.buffer = sync.transport.buffer()
        self.entries: list[tuple[str, Tensor, int]] = []
        """name, tensor or its copy, offset"""
        self.sums: list[int] = []
        """of the first entries"""
        self.used, self.summed, self.number = 0, 0, 0

    def add(self, name: str, tensor: Tensor) -> None:
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
        """The checksums that are missing, together: one by one each would find its code out of the cache."""
        clock = time.perf_counter()
        self.sums += checksums([tensor for _, tensor, _ in self.entries[len(self.sums) :]])
        self.summed = self.used
        spent = time.perf_counter() - clock
        self.report.checksum_s += spent
        self.report.verify_s += spent

    def flush(self) -> None:
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
