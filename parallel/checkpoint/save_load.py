"""Save and load a run at any layout: Megatron's dist_checkpointing, with atomic writes, checks and clear errors.

    pending = begin_checkpoint(...)   every rank; copies what is on a GPU, then writes in the background
    pending.finish()                  every rank; waits, then publishes: manifest, rename, pointer, retention
    save_checkpoint(...)              both at once
    load_checkpoint(...)              every rank; into a model of the same shape and any layout

A save that is cut off anywhere, by a kill or a full disk, leaves the previous checkpoint as it was:
everything is written under a temporary name, and `latest.json` moves last. An error on one rank is
raised on all. `files.py` handles names, checksums and the pointer, `sharded_state.py` the tensors,
`manifest.py` the description.

Two parts of megatron-core are bypassed: the pool of writer processes (its result queue costs 11 s of
imports at the first save, and it hangs if a writer dies), and `common.pt` and object shards (pickles).
A load reads JSON, tensors (by torch with weights_only) and torch's `.metadata` pickle, after an
unpickler that knows only torch's metadata classes has accepted it.
"""

import base64
import contextlib
import gc
import inspect
import json
import multiprocessing
import os
import pickle
import queue
import shutil
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)

from phimini.model.io.checked_files import describe_file
from phimini.model.io.json_files import atomic_file
from phimini.parallel.checkpoint import files
from phimini.parallel.checkpoint import sharded_state as state
from phimini.parallel.checkpoint.manifest import check_fits, new_manifest
from phimini.parallel.megatron.builder import Model
from phimini.parallel.megatron.hf_weights import gather_parameters
from phimini.parallel.ranks.process import end_with_parent
from phimini.parallel.ranks.world import World, on_every, on_main
from phimini.parallel.training.optimizer import Optimizer

_BALLAST = "ballast"
_BALLAST_BYTES = 1 << 20
"""Reserved while tensors are written, so that a full disk fails there and not at the metadata."""


def save_checkpoint(
    directory: str | os.PathLike[str],
    step: int,
    model: Model,
    optimizer: Optimizer | None,
    extra: dict[str, Any] | None = None,
    *,
    keep: int = 2,
) -> None:
    """Save a checkpoint and wait for it, writing in this process. Arguments and errors as in `begin_checkpoint`. Collective."""
    _begin(directory, step, model, optimizer, extra, keep, background=False).finish()


def begin_checkpoint(
    directory: str | os.PathLike[str],
    step: int,
    model: Model,
    optimizer: Optimizer | None,
    extra: dict[str, Any] | None = None,
    *,
    keep: int = 2,
) -> "PendingCheckpoint":
    """Copy the current state and write it in a forked process while training continues. Collective.

    directory: holds the checkpoints of one run; seen by every rank.
    optimizer: None saves weights only.
    extra: the run's position (data, RNG, metrics) as JSON; rank 0's is kept.
    keep: the number of checkpoints that stay, this one included.

    The checkpoint is published by `finish()`, which every rank must call once before the next save.
    Raises ValueError or OSError, the same on every rank, naming the file or field.
    """
    return _begin(directory, step, model, optimizer, extra, keep, background=True)


class PendingCheckpoint:
    """A save whose tensors are being written. It is complete once `finish` has returned."""

    def __init__(
        self,
        world: World,
        step: int,
        temporary: Path,
        keep: int,
        manifest: dict[str, Any],
        request: Any,
        results: "queue.SimpleQueue[Any]",
        written: "Connection | tuple[Any, dict[str, Any], str | None]",
        process: Any,
    ) -> None:
        self.step = step
        self._world = world
        self._temporary = temporary
        self._keep = keep
        self._manifest = manifest
        self._request = request
        self._results = results
        self._written = written
        self._process = process

    def is_written(self) -> bool:
        """Return True if this rank's writer is done. Does not communicate."""
        return not isinstance(self._written, Connection) or self._written.poll()

    def finish(self) -> None:
        """Wait for all writers and publish the checkpoint. Collective. Raises as `begin_checkpoint`."""
        results, described, error = self._collect()
        everyone = self._world.all_gather_objects((described, error))
        if errors := [e for _, e in everyone if e]:
            if self._world.is_main:
                shutil.rmtree(self._temporary)
            raise OSError(errors[0])
        self._results.put(results)
        if self._world.is_main:
            (self._temporary / _BALLAST).unlink()
        for finalize in self._request.finalize_fns:
            finalize()  # gathers where each tensor lies and writes .metadata
        self._manifest["files"] = {name: d for found, _ in everyone for name, d in found.items()}
        on_main(self._world, self._publish)

    def _collect(self) -> tuple[Any, dict[str, Any], str | None]:
        if not isinstance(self._written, Connection):
            return self._written
        try:
            outcome = pickle.loads(self._written.recv_bytes())  # our own process, through a pipe
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            outcome = ({}, {}, f"{self._temporary}: the writer process ended with exit code {code}")
        self._process.join()
        return outcome

    def _publish(self) -> None:
        directory = self._temporary.parent
        with _naming(self._temporary):
            # Megatron's own loader needs these two files; ours does not read them.
            save_config(CheckpointingConfig("torch_dist", 1), str(self._temporary))
            torch.save({"iteration": self.step}, self._temporary / "common.pt")
            for name in (".metadata", "metadata.json", "common.pt"):
                self._manifest["files"][name] = describe_file(self._temporary / name)
            files.write_manifest(self._temporary, self._manifest)
        checkpoint = files.new_directory(directory, self.step)
        self._temporary.rename(checkpoint)
        files.move_pointer(directory, checkpoint)
        files.remove_old(directory, checkpoint, self._keep)


def load_checkpoint(
    directory: str | os.PathLike[str],
    model: Model,
    optimizer: Optimizer | None = None,
    step: int | None = None,
) -> tuple[int, dict[str, Any]]:
    """Fill model, optimizer and schedule from the latest checkpoint, or that of `step`. Collective.

    The layout may differ from that of the save. Without an optimizer only weights are read.
    Returns the step and the saved `extra`.

    Raises ValueError, the same on every rank and before anything is changed: no checkpoint, a file
    that is missing or altered, a model of another shape, another dtype, schedule, or no optimizer state.
    """
    directory, world = Path(directory), model.world

    def choose() -> tuple[Path, dict[str, Any]]:
        found = (
            files.find_step(directory, step) if step is not None else files.read_pointer(directory)
        )
        if found is None:
            raise ValueError(f"{directory}: has no checkpoint ({files.POINTER} is missing)")
        manifest = files.read_manifest(found)
        check_fits(found, manifest, model, optimizer)
        return found, manifest

    checkpoint, manifest = on_main(world, choose)
    names = sorted(manifest["files"])[world.rank :: world.world_size]
    on_every(world, lambda: files.check_files(checkpoint, manifest["files"], names))
    on_main(world, lambda: files.check_metadata_is_plain(checkpoint))
    targets, wholes = state.model_state(model), {}
    if optimizer is not None:
        of_optimizer, wholes = state.optimizer_targets(model, optimizer.megatron)
        targets |= of_optimizer
    TorchDistLoadShardedStrategy().load(dict(targets), checkpoint)  # into the tensors themselves
    state.apply_model(model, targets)
    if optimizer is not None:
        num_updates = manifest["optimizer"]["num_updates"]
        state.apply_optimizer(model, optimizer.megatron, wholes, num_updates)
        optimizer.scheduler.num_steps = 0  # loading adds to it
        optimizer.scheduler.load_state_dict(manifest["optimizer"]["scheduler"])
        model.num_updates = num_updates
    return manifest["step"], manifest["extra"]


def latest_step(directory: str | os.PathLike[str]) -> int | None:
    """Return the step of the newest complete checkpoint in `directory`, or None. Does not communicate.

    Raises ValueError if the pointer is damaged or names a missing checkpoint.
    """
    checkpoint = files.read_pointer(Path(directory))
    return None if checkpoint is None else files.step_of(checkpoint)


def rng_state() -> dict[str, str]:
    """Return the states of this rank's torch generators, as JSON for `extra`."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {k: base64.b64encode(v.numpy().tobytes()).decode() for k, v in states.items()}


def set_rng_state(saved: dict[str, str]) -> None:
    """Set the torch generators from `rng_state`. A CUDA state is skipped on a machine without CUDA."""
    for device, text in saved.items():
        value = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if device == "cpu":
            torch.set_rng_state(value)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(value)


def _begin(
    directory: str | os.PathLike[str],
    step: int,
    model: Model,
    optimizer: Optimizer | None,
    extra: dict[str, Any] | None,
    keep: int,
    background: bool,
) -> PendingCheckpoint:
    world = model.world
    manifest = new_manifest(step, model, optimizer, extra or {})
    temporary = on_main(world, lambda: _prepare(Path(directory), step, keep, manifest))
    on_every(world, lambda: _check_shared(temporary))
    gather_parameters(model)
    contents = state.model_state(model)
    if optimizer is not None:
        contents |= state.optimizer_state(model, optimizer.megatron)
    sharded, common = save_preprocess(contents)
    assert not common, f"only tensors are saved, got {list(common)}"
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    filesystem_async._results_queue = results  # pyright: ignore[reportAttributeAccessIssue]
    strategy: Any = get_default_save_sharded_strategy()
    strategy.thread_count = 2  # files per rank; the default is 2 in 0.16 and 1 in 0.19
    request = strategy.async_save(sharded, temporary, *_ASYNC_STRATEGY)
    buckets = request.preload_fn() if request.preload_fn else []
    num_bytes = sum(t.nbytes for _, _, (_, tensors) in buckets for _, t in tensors)
    needed = sum(world.all_gather_objects(num_bytes))
    on_main(world, lambda: _check_space(temporary, needed))
    transforms = request.async_fn.args[0] if buckets else []
    written: Any
    process: Any = None
    if background and buckets:
        context = multiprocessing.get_context("fork")
        written, send = context.Pipe(duplex=False)
        process = context.Process(target=_write_and_report, args=(buckets, transforms, send))
        # Without the collector: finalising an inherited GPU tensor in the writer may call CUDA, which does not work in a fork.
        collects = gc.isenabled()
        gc.disable()
        try:
            process.start()
        finally:
            if collects:
                gc.enable()
        send.close()
    else:
        written = _write(buckets, transforms)
    return PendingCheckpoint(
        world, step, temporary, keep, manifest, request, results, written, process
    )


# 0.19 needs an argument to use its own writer instead of nvidia-resiliency-ext's; 0.16 has no other.
_ASYNC_STRATEGY = (
    ("mcore",)
    if "async_strategy" in inspect.signature(TorchDistSaveShardedStrategy.async_save).parameters
    else ()
)


def _write(
    buckets: list[Any], transforms: list[Any]
) -> tuple[dict[int, Any], dict[str, Any], str | None]:
    """Write the buckets. Return Megatron's result of each file, our description of each, and an error or None."""
    results, described = {}, {}
    for i, bucket in enumerate(buckets):
        path = Path(bucket[0])
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        counter: queue.Queue[int] = queue.Queue()
        counter.put(i)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms,
            i,
            bucket,
            results_queue=done,  # pyright: ignore[reportArgumentType]
            count_queue=counter,  # pyright: ignore[reportArgumentType]
            use_fsync=True,
        )
        _, outcome = done.get()
        try:
            described[path.name] = describe_file(path)
        except OSError as e:
            outcome = outcome if isinstance(outcome, BaseException) else e
        if isinstance(outcome, BaseException):
            free = files.free_bytes(path.parent)
            return {}, {}, f"{path}: cannot be written, {free} bytes are free: {outcome}"
        results[i] = outcome
    return results, described, None


def _write_and_report(buckets: list[Any], transforms: list[Any], send: Connection) -> None:
    # A writer without its trainer is useless, and would hold the GPU that the next trainer needs.
    end_with_parent()
    send.send_bytes(pickle.dumps(_write(buckets, transforms)))


def _prepare(directory: Path, step: int, keep: int, manifest: dict[str, Any]) -> Path:
    """Make the temporary directory of this save, with the ballast in it. Raises ValueError or OSError."""
    if keep < 1:
        raise ValueError(f"save_checkpoint: keep must be at least 1, got {keep}")
    if step < 0:
        raise ValueError(f"save_checkpoint: step must not be negative, got {step}")
    try:
        json.dumps(manifest["extra"])
    except (TypeError, ValueError) as e:
        raise ValueError(f"save_checkpoint: extra is not JSON: {e}") from e
    directory.mkdir(parents=True, exist_ok=True)
    files.begin_pointer(directory)
    files.remove_cut_off(directory)
    temporary = directory / (files.new_directory(directory, step).name + files.TEMPORARY)
    with _naming(temporary):
        temporary.mkdir()
        with atomic_file(temporary / _BALLAST) as f:
            f.write(bytes(_BALLAST_BYTES))
    return temporary


@contextlib.contextmanager
def _naming(temporary: Path) -> Iterator[None]:
    """Add path and free space to the error of a failing write, and remove the directory."""
    try:
        yield
    except OSError as e:
        free = files.free_bytes(temporary.parent)
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"{temporary}: cannot be written, {free} bytes are free: {e}") from e


def _check_shared(temporary: Path) -> None:
    if not temporary.is_dir():
        raise ValueError(
            f"{temporary}: not seen by every rank; checkpoints need a shared directory"
        )


def _check_space(temporary: Path, needed: int) -> None:
    free = files.free_bytes(temporary)
    if needed > free:
        shutil.rmtree(temporary)
        raise OSError(
            f"{temporary.parent}: the disk is too full for a checkpoint: it needs {needed} bytes, {free} are free"
        )
