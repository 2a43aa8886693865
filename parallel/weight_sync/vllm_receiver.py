"""The engines' side of a weight sync: weight-transfer engines for vLLM, and its workers' answers to the trainer.

Imported only in a process that runs a vLLM engine: `worker_extension_cls` names `WorkerExtension`, and vLLM imports it
before it loads a model. The import registers the transports with vLLM's factory.

vLLM loads layer by layer. It moves a layer to the meta device, fills it, processes it (on a CPU it packs the weight for
oneDNN and leaves the parameter with shape (0,)) and copies it over the old weights. A bucket is therefore checked before
it is loaded, and after `finish` every parameter is read back (`readback.py`).
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.platforms import current_platform

from phimini.kernels import checksums
from phimini.model.config import ModelConfig
from phimini.parallel.megatron.weight_names import hf_names
from phimini.parallel.ranks.process import end_with_parent
from phimini.parallel.weight_sync import gpu_transports as weight_sync_cuda
from phimini.parallel.weight_sync.cpu_transports import (
    IN_THIS_PROCESS,
    broadcast,
    first_line,
    join_gloo,
    map_segment,
)
from phimini.parallel.weight_sync.deadline import WeightSyncError
from phimini.parallel.weight_sync.fp8_blocks import SCALE_SUFFIX, quantised_names
from phimini.parallel.weight_sync.readback import ReadBack
from phimini.parallel.weight_sync.sync import Entry, backend, entry_of


@dataclass
class SyncInit(WeightTransferInitInfo):
    """Fields of the init phase; `link` is the transport's."""

    config: dict[str, Any]
    fp8: bool
    deadline_s: float
    link: dict[str, Any]


@dataclass
class SyncUpdate(WeightTransferUpdateInfo):
    """Fields of the update phase: one bucket and its entries."""

    bucket: int
    num_bytes: int
    entries: list[dict[str, Any]]


@dataclass
class _Update:
    """The state of one update, from start to finish."""

    loading: bool = False
    """True once a bucket is loaded, so that the old weights are incomplete"""
    checksums: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("load_s", "verify_s", "checksum_s"), 0.0)
    )


class SyncEngine(WeightTransferEngine[SyncInit, SyncUpdate]):
    """Base of the transports' engines, which differ in `_link` and `_receive`."""

    init_info_cls = SyncInit
    update_info_cls = SyncUpdate

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.whole = True
        self.update = _Update()
        self._read_back: ReadBack
        self._deadline_s = 60.0

    @property
    def where(self) -> str:
        """This worker's name in errors."""
        return f"worker {self.parallel_config.rank}"

    def error(self, phase: str, tensor: str | None, detail: str) -> WeightSyncError:
        """Return an error of this worker."""
        return WeightSyncError(phase, self.where, tensor, detail)

    # --- the four phases, called by vLLM's worker -------------------------------------------------
    def init_transfer_engine(self, init_info: SyncInit) -> None:
        """Run the init phase: learn the model's shapes and join the transport."""
        self.config = ModelConfig(**_tuples(init_info.config))
        self._shapes = quantised_names(self.config) if init_info.fp8 else hf_names(self.config)
        self._deadline_s = init_info.deadline_s
        self._link(init_info.link)

    def start_weight_update(self) -> None:
        """Run the start phase: forget the previous update."""
        self.update = _Update()
        self._read_back = ReadBack(self.model, self.config)

    def update_weights(self, update_info: dict[str, Any]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Run the update phase of one bucket."""
        # The base class synchronises an accelerator, which a CPU does not have.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: SyncUpdate) -> None:
        """Receive one bucket, check it, and only then load it."""
        entries = [entry_of(e) for e in update_info.entries]
        for entry in entries:
            if entry.offset + entry.num_bytes > update_info.num_bytes:
                raise self.error(
                    "transfer",
                    entry.name,
                    f"bucket {update_info.bucket} is truncated: {update_info.num_bytes} bytes, the tensor ends at "
                    f"{entry.offset + entry.num_bytes}",
                )
        tensors = self._receive(update_info, entries)
        clock = time.perf_counter()
        self._check(entries, tensors)
        self._spent("checksum_s", clock)
        self._read_back.expect(entries, tensors)
        clock = self._spent("verify_s", clock)
        if not self.update.loading:
            self.update.loading, self.whole = True, False
            initialize_layerwise_reload(self.model)
        self.model.load_weights(self._loading(entries, tensors))  # pyright: ignore[reportCallIssue]
        if current_platform.is_cuda():
            torch.cuda.synchronize()  # after this the trainer fills its bucket again
        self._spent("load_s", clock)

    def _loading(self, entries: list[Entry], tensors: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors for vLLM to load; read each layer back once it is packed, which counts as verification."""
        for entry, tensor in zip(entries, tensors, strict=True):
            yield entry.name, self._kept(entry.name, tensor)
            clock = time.perf_counter()
            self._read_back.check_packed(entry.name)
            self.update.seconds["load_s"] -= self._spent("verify_s", clock) - clock

    def finish_weight_update(self) -> None:
        """Run the finish phase: complete the layers and read all weights back."""
        missing = [name for name in self._shapes if name not in self.update.checksums]
        if missing:
            detail = f"{len(missing)} of the model's tensors did not come"
            raise self.error("finish", missing[0], detail)
        clock = time.perf_counter()
        finalize_layerwise_reload(self.model, self.model_config)
        repack_tied_head(self.model)
        clock = self._spent("load_s", clock)
        wrong = self._read_back.check()
        self._spent("verify_s", clock)
        if wrong is not None:
            raise self.error("verify", *wrong)
        self._read_back = ReadBack(self.model, self.config)
        self.whole = True

    def shutdown(self) -> None:
        """Leave the transport."""

    def abort(self) -> None:
        """End an update that failed, and complete vLLM's bookkeeping even if the weights are mixed."""
        if self.update.loading and not self.whole:
            finalize_layerwise_reload(self.model, self.model_config)
        self.update = _Update()

    # --- what differs -----------------------------------------------------------------------------
    def _link(self, link: dict[str, Any]) -> None:
        raise NotImplementedError

    def _receive(self, update: SyncUpdate, entries: list[Entry]) -> list[Tensor]:
        raise NotImplementedError

    # --- checks -----------------------------------------------------------------------------------
    def _spent(self, key: str, since: float) -> float:
        now = time.perf_counter()
        self.update.seconds[key] += now - since
        return now

    def _check(self, entries: list[Entry], tensors: list[Tensor]) -> None:
        for entry in entries:
            if entry.shape != self._shapes.get(entry.name):
                detail = f"no tensor of this model has this name and shape {entry.shape}"
                raise self.error("transfer", entry.name, detail)
            if entry.name in self.update.checksums:
                raise self.error("transfer", entry.name, "came twice")
        for entry, value in zip(entries, self._arrived(entries, tensors), strict=True):
            if value != entry.checksum:
                detail = f"checksum {value}, the trainer's is {entry.checksum}"
                raise self.error("transfer", entry.name, detail)
            self.update.checksums[entry.name] = value

    def _arrived(self, entries: list[Entry], tensors: list[Tensor]) -> list[int]:
        return checksums(tensors)

    def _kept(self, name: str, tensor: Tensor) -> Tensor:
        """Clone FP8 weights and scales: vLLM holds them until their layer is complete, and the bucket is reused."""
        paired = name.endswith(SCALE_SUFFIX) or tensor.dtype == torch.float8_e4m3fn
        return tensor.clone() if paired else tensor


class InprocEngine(SyncEngine):
    def _link(self, link: dict[str, Any]) -> None:
        self._key = link["key"]

    def _receive(self, update: SyncUpdate, entries: list[Entry]) -> list[Tensor]:
        return IN_THIS_PROCESS[self._key]

    def _arrived(self, entries: list[Entry], tensors: list[Tensor]) -> list[int]:
        return [
            entry.checksum for entry in entries
        ]  # the trainer's own tensors: no transfer to check


class ShmEngine(SyncEngine):
    def _link(self, link: dict[str, Any]) -> None:
        try:
            self._segment = map_segment(link["pid"], link["descriptor"], link["num_bytes"])
        except (OSError, ValueError) as error:
            raise self.error("init", None, f"shm: {error}") from error

    def _receive(self, update: SyncUpdate, entries: list[Entry]) -> list[Tensor]:
        return [entry.view(self._segment) for entry in entries]


class GlooEngine(SyncEngine):
    def _link(self, link: dict[str, Any]) -> None:
        try:
            self._group = join_gloo(link, self.parallel_config.rank, self._deadline_s)
        except (RuntimeError, OSError) as error:
            raise self.error("init", None, f"gloo: {first_line(error)}") from error
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def _receive(self, update: SyncUpdate, entries: list[Entry]) -> list[Tensor]:
        assert self._group is not None, "init comes first"
        if self._buffer.numel() < update.num_bytes:
            self._buffer = torch.empty(update.num_bytes, dtype=torch.uint8)
        try:
            broadcast(self._group, self._buffer[: update.num_bytes], self._deadline_s)
        except RuntimeError as error:
            raise self.error("transfer", entries[0].name, f"gloo: {first_line(error)}") from error
        return [entry.view(self._buffer) for entry in entries]

    def shutdown(self) -> None:
        self._group = None


class IpcEngine(SyncEngine):
    def _link(self, link: dict[str, Any]) -> None:
        try:
            handle = link["handles"][self.parallel_config.rank]
            self._bucket = weight_sync_cuda.open_bucket(handle)
        except RuntimeError as error:
            raise self.error("init", None, f"ipc: {first_line(error)}") from error

    def _receive(self, update: SyncUpdate, entries: list[Entry]) -> list[Tensor]:
        # Copies only if the trainer uses another GPU: Triton's kernels run on this worker's GPU.
        data = self._bucket[: update.num_bytes].to(self.device)
        return [entry.view(data) for entry in entries]


class NcclEngine(SyncEngine):
    _communicator: Any = None

    def _link(self, link: dict[str, Any]) -> None:
        self.shutdown()
        self._buffer = torch.empty(0, dtype=torch.uint8, device=self.device)
        rank = link["first_rank"] + self.parallel_config.rank
        try:
            self._communicator = weight_sync_cuda.communicator_within(link, rank, self._deadline_s)
        except RuntimeError as error:
            raise self.error("init", None, f"nccl: {first_line(error)}") from error

    def _receive(self, update: SyncUpdate, entries: list[Entry]) -> list[Tensor]:
        assert self._communicator is not None, "init comes first"
        if self._buffer.numel() < update.num_bytes:
            self._buffer = torch.empty(update.num_bytes, dtype=torch.uint8, device=self.device)
        data = self._buffer[: update.num_bytes]
        try:
            weight_sync_cuda.broadcast(self._communicator, data, self._deadline_s)
        except RuntimeError as error:
            self.shutdown()
            raise self.error("transfer", entries[0].name, f"nccl: {first_line(error)}") from error
        return [entry.view(data) for entry in entries]

    def shutdown(self) -> None:
        if self._communicator is not None:
            self._communicator.destroy()
            self._communicator = None


ENGINES: dict[str, type[SyncEngine]] = {
    "inproc": InprocEngine,
    "shm": ShmEngine,
    "gloo": GlooEngine,
    "ipc": IpcEngine,
    "nccl": NcclEngine,
}


def register() -> None:
    """Register the transports with vLLM's factory; a second call has no effect."""
    for name, engine in ENGINES.items():
        if backend(name) not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(backend(name), engine)


def repack_tied_head(model: nn.Module) -> None:
    """Pack a tied head's copy of the embedding again: on a CPU, vLLM 0.32 leaves it with the old weights."""
    head = getattr(model, "lm_head", None)
    if head is None or not current_platform.is_cpu() or not hasattr(head, "cpu_linear"):
        return
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    dispatch_cpu_unquantized_gemm(head, remove_weight=False)


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """Turn lists back into tuples, which JSON does not have."""
    return {
        key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()
    }


_watched: list[threading.Thread] = []
"""this worker's thread that waits for the end of its server"""


def _end_core(server: int, core: int) -> None:
    """Wait for the server to end and kill the core, whose workers then end by themselves."""
    with contextlib.suppress(ProcessLookupError):
        ended = select.poll()
        ended.register(os.pidfd_open(server), select.POLLIN)
        ended.poll()
    if os.getppid() == core:
        os.kill(core, signal.SIGKILL)


MALFORMED = (
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    AssertionError,
    RuntimeError,
    OSError,
)
"""errors of a phase whose fields are wrong or that came out of turn; the worker goes on after each of them"""


class WorkerExtension:
    """Methods that vLLM adds to its worker (`worker_extension_cls`); called with `collective_rpc`."""

    def phimini_guard(self, server: int) -> int:
        """Return this process's id, after arranging that the engine does not outlive the server that forked it."""
        parent = os.getppid()
        if sys.platform == "linux" and parent == server:
            end_with_parent()
        elif sys.platform == "linux" and not _watched:
            # One of several workers: the server forked their core, which would keep running without it.
            _watched.append(threading.Thread(target=_end_core, args=(server, parent), daemon=True))
            _watched[0].start()
        return os.getpid()

    def phimini_sync(self, phase: str, info: dict[str, Any]) -> dict[str, Any]:
        """Run one phase of a sync. An error is returned as fields, so that the trainer can name worker, tensor and phase."""
        worker: Any = self
        engine = worker.weight_transfer_engine
        try:
            if phase == "init":
                worker.init_weight_transfer_engine(info)
            elif phase == "start":
                worker.start_weight_update()
            elif phase == "update":
                worker.update_weights(info)
            elif phase == "finish":
                worker.finish_weight_update()
            elif phase == "abort":
                engine.abort()
                worker._weight_update_active = False
            else:
                raise ValueError(f"phimini_sync: unknown phase {phase!r}")
        except WeightSyncError as error:
            return {"error": error.fields()}
        except MALFORMED as error:
            return {"error": engine.error("init", None, f"{phase}: {type(error).__name__}: {error}").fields()}  # fmt: skip
        answer = {"where": engine.where, "whole": engine.whole}
        if phase == "finish":
            answer |= {"checksums": engine.update.checksums, **engine.update.seconds}
        return answer


register()
