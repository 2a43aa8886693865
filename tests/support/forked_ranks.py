"""Forked ranks for tests: with a time limit, ready in 0.1 s, and each failure's cause named.

The product starts its ranks with torch's elastic launcher (`phimini.parallel.ranks.local_launch`), which has no time
limit, takes 0.3 s a job, and waits up to 30 s for ranks that hang: tests start hundreds of jobs, and let ranks hang.
"""

import gc
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from phimini.parallel.ranks import process
from phimini.parallel.ranks.local_launch import RankFailure

_GRACE_S = 1.0
"""how long the others may still report their own failure before they are killed"""
_INTERRUPT_GRACE_S = 60.0
"""how long ranks may take to save after Ctrl-C"""


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float | None = None
) -> list[Any]:
    """Runs `fn(*args)` in `world_size` forked processes and returns what each returned, by rank.

    Each child gets torchrun's environment (RANK, WORLD_SIZE, MASTER_ADDR, ...) and one compute thread; its stdout and
    stderr are the parent's. What it returns must pickle. `fn` may be a closure. If a rank fails, the others are
    killed within seconds and `RankFailure` carries the rank and its traceback. Ctrl-C reaches every rank once (as
    KeyboardInterrupt) and is raised here again after they ended. If the parent dies, the kernel ends the ranks.

    `timeout_s`: wall seconds for the whole job; None waits for ever.
    """
    if world_size < 1:
        raise ValueError(f"run_ranks: world_size must be at least 1, got {world_size}")
    if torch.cuda.is_initialized():
        raise RuntimeError(
            "run_ranks: CUDA is in use and does not survive a fork; start ranks with torchrun"
        )
    if process.process_group_joined:
        raise RuntimeError(
            "run_ranks: this process has joined a process group before, whose threads do not survive a fork"
        )
    sys.stdout.flush()
    sys.stderr.flush()
    context = multiprocessing.get_context("fork")
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    processes, connections = [], []
    for rank in range(world_size):
        receive, send = context.Pipe(duplex=False)
        child = context.Process(
            target=_child, args=(rank, world_size, port, listener, send, connections, fn, args)
        )
        child.start()
        send.close()
        processes.append(child)
        connections.append(receive)
    # The parent serves the rendezvous, as torchrun's agent does: no port is chosen and then lost to another process.
    # Ranks that connect earlier wait in the socket's backlog.
    store = TCPStore(
        "127.0.0.1", port, world_size, is_master=True, wait_for_workers=False,
        timeout=timedelta(seconds=300), master_listen_fd=listener.detach(),
    )  # fmt: skip
    try:
        return _collect(processes, connections, timeout_s)
    except KeyboardInterrupt:
        for child in processes:
            if child.is_alive() and child.pid is not None:
                os.kill(child.pid, signal.SIGINT)
        _join(processes, _INTERRUPT_GRACE_S)
        raise
    finally:
        for child in processes:
            child.kill()
        _join(processes, 10.0)
        for connection in connections:
            connection.close()
        del store


def _collect(
    processes: list[Any], connections: list[Connection], timeout_s: float | None
) -> list[Any]:
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    results: dict[int, Any] = {}
    failures: dict[int, tuple[str, tuple[str, str] | None]] = {}  # in order of arrival
    silent: list[int] = []  # ended without a word: they are the cause, whoever complained first
    rank_of = {connection: rank for rank, connection in enumerate(connections)}
    waiting = set(connections)
    while waiting:
        remaining = None if deadline is None else deadline - time.monotonic()
        ready = wait(list(waiting), remaining) if remaining is None or remaining > 0 else []
        if not ready:
            break
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = rank_of[connection]
            waiting.discard(connection)
            try:
                kind, payload = pickle.loads(connection.recv_bytes())
            except EOFError:
                processes[rank].join(10.0)
                silent.append(rank)
                text = f"ended without a result, {_exit_text(processes[rank].exitcode)}"
                kind, payload = "failed", (text, None)
            if kind == "returned":
                results[rank] = payload
            else:
                if not failures:
                    deadline = time.monotonic() + _GRACE_S
                failures[rank] = payload
    if failures:
        rank = silent[0] if silent else next(iter(failures))
        text, error = failures[rank]
        also = sorted(set(failures) - {rank})
        others = f"\n(then also rank {', '.join(map(str, also))})" if also else ""
        raise RankFailure(rank, f"rank {rank} of {len(processes)} failed: {text}{others}", error)
    if waiting:
        late = sorted(rank_of[connection] for connection in waiting)
        raise RankFailure(
            late[0],
            f"rank {', '.join(map(str, late))} of {len(processes)} did not end within {timeout_s} s",
        )
    return [results[rank] for rank in range(len(processes))]


def _exit_text(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


def _join(processes: list[Any], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for child in processes:
        child.join(max(0.0, deadline - time.monotonic()))


def _child(
    rank: int,
    world_size: int,
    port: int,
    listener: socket.socket,
    send: Connection,
    inherited: list[Connection],
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    # A process group of its own: the terminal's Ctrl-C reaches the parent only, which forwards it once.
    os.setpgid(0, 0)
    process.end_with_parent()
    listener.close()
    for connection in inherited:
        connection.close()
    # The parent's garbage is not this process's to collect: a store among it would wait for a thread that was not forked.
    gc.freeze()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        OMP_NUM_THREADS="1",
        GLOO_SOCKET_IFNAME=os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    )
    torch.set_num_threads(1)
    try:
        message = ("returned", fn(*args))
    # Whatever it is, the parent must hear of it; KeyboardInterrupt and SystemExit too.
    except BaseException as error:
        message = ("failed", (traceback.format_exc(), (type(error).__name__, str(error))))
    send.send_bytes(pickle.dumps(message))
    send.close()
    sys.stdout.flush()
    sys.stderr.flush()
    # No interpreter shutdown: gloo's threads may still wait for a rank that is gone.
    os._exit(0 if message[0] == "returned" else 1)
