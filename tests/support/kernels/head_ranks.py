"""Several gloo ranks, forked from the test."""

import os
import signal
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_S = 60


def run_ranks(world_size: int, tmp_path: Path, fn: Callable[[int], Any]) -> list[Any]:
    """Call `fn(rank)` on each rank of a gloo world; return the results in rank order. A rank's error fails the test."""
    children = []
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            _child(rank, world_size, tmp_path, fn)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    errors = [p.read_text() for p in sorted(tmp_path.glob("error*"))]
    assert not any(codes), "\n".join([f"exit codes {codes}", *errors])
    return [torch.load(tmp_path / f"result{rank}") for rank in range(world_size)]


def _child(rank: int, world_size: int, tmp_path: Path, fn: Callable[[int], Any]) -> None:
    code = 1
    try:
        signal.alarm(TIMEOUT_S)
        store = dist.FileStore(str(tmp_path / "store"), world_size)  # pyright: ignore
        dist.init_process_group(
            "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=TIMEOUT_S),
        )
        torch.save(fn(rank), tmp_path / f"result{rank}")
        dist.barrier()
        code = 0
    except BaseException:
        (tmp_path / f"error{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise
    finally:
        os._exit(code)
