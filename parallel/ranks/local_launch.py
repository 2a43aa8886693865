"""Start the ranks of a job on this machine, with torch's elastic launcher.

`processes=N` of a run comes here. Several machines are started by torchrun, which sets the same environment.
"""

import contextlib
import gc
import json
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import (
    ChildFailedError,
    ProcessFailure,
    get_error_handler,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from phimini.parallel.ranks import process

_SAVE_S = 60
"""Seconds that ranks may take to save after Ctrl-C or SIGTERM before they are killed."""


class RankFailure(RuntimeError):
    """A rank that raised or died.

    `rank` is the first that failed; its traceback is in the message. `error` is (type name, message) of the exception
    that it raised, or None if it died.
    """

    def __init__(self, rank: int, message: str, error: tuple[str, str] | None = None) -> None:
        super().__init__(message)
        self.rank = rank
        self.error = error


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Run `fn(*args)` in `world_size` processes and return their results by rank.

    Each process gets torchrun's environment (RANK, WORLD_SIZE, MASTER_ADDR, ...), one compute thread and this
    process's stdout and stderr. The processes are forked, so the imports are paid once and `fn` may be a closure.
    Once CUDA or a process group is in use here they are spawned instead, and `fn` and `args` must pickle, as results
    always must.

    Ctrl-C and SIGTERM reach every rank once; KeyboardInterrupt is raised here after they ended. Each has to raise: one
    that returns is kept waiting, and killed after 60 s. If this process dies, the kernel kills the ranks.

    Raises RankFailure if a rank fails, after the others were stopped with SIGTERM and, 30 s later, SIGKILL.
    """
    if world_size < 1:
        raise ValueError(f"run_ranks: world_size must be at least 1, got {world_size}")
    sys.stdout.flush()
    sys.stderr.flush()
    # The store of an earlier job may be garbage. A rank that collected it would crash: its threads are not forked.
    gc.collect()
    with tempfile.TemporaryDirectory(prefix="phimini-ranks-") as folder, _quiet(), _own_handlers():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=world_size,
            run_id="local",
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            monitor_interval=0.05,
            start_method="fork" if process.can_fork() else "spawn",
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            signals_to_handle="SIGINT,SIGTERM",
            shutdown_timeout=_SAVE_S,
        )
        try:
            # In one tuple: the launcher would substitute $ in words of its own argument list.
            results = elastic_launch(config, _rank)((fn, args))
        except SignalException as stop:
            raise KeyboardInterrupt from stop
        except ChildFailedError as error:
            raise _described(world_size, *error.get_first_failure(), Path(folder)) from None
    return [results[rank] for rank in range(world_size)]


def _rank(call: tuple[Callable[..., Any], tuple[Any, ...]]) -> Any:
    """Run one rank's call in its process."""
    # A process group of its own: a terminal's Ctrl-C reaches the parent only, which forwards it once.
    os.setpgid(0, 0)
    process.end_with_parent()
    # Freeze the inherited objects: finalising the parent's store here would wait for a thread that was not forked.
    gc.freeze()
    logging.disable(logging.NOTSET)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    fn, args = call
    try:
        return fn(*args)
    # The parent must hear of KeyboardInterrupt and SystemExit too; torch takes the first for success.
    except BaseException as error:
        get_error_handler().record_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        # Skip the interpreter's shutdown: threads of gloo may still wait for a rank that is gone.
        os._exit(1)


def _described(world_size: int, rank: int, failure: ProcessFailure, folder: Path) -> RankFailure:
    """Return the failure of a rank with its signal, its exit code or the traceback that it recorded.

    Of ranks that died within one poll of the launcher it knows the lowest. A survivor's record in `folder` names all.
    """
    recorded: Any = failure.message
    if isinstance(recorded, dict):
        name, _, message = recorded["message"].partition(": ")
        text, error = recorded["extraInfo"]["py_callstack"], (name, message)
    else:
        how = f"killed by {failure.signal_name()}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"  # fmt: skip
        text, error = f"ended without a result, {how}", None
        records = (json.loads(f.read_text()) for f in sorted(folder.rglob("error.json")))
        messages = (record["message"]["message"] for record in records)
        lost = next((m for m in messages if m.startswith("LostRanks: ")), None)
        text += "" if lost is None else f"; {lost}"
    return RankFailure(rank, f"rank {rank} of {world_size} failed: {text}", error)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the launcher's own log: a failure is reported once, as RankFailure."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _own_handlers() -> Iterator[None]:
    """Put back the handlers of SIGINT and SIGTERM, which the launcher replaces in the main thread."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
