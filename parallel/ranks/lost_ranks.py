"""When a collective fails, find out which ranks stopped responding and name them in the error.

A rank that was killed closes its connections, and one that hangs lets a collective's deadline pass
(`world.initialize(timeout_s=)`). Either way the other ranks get an error of gloo or NCCL that names no rank. Each of
them then reports to the job's store, and reads which ranks have not. The store is served by torchrun's agent, or by
the process that called `run_ranks`; both outlive every rank.
"""

import contextlib
import signal
import time
from collections.abc import Iterator

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from phimini.parallel.ranks.world import World

WAIT_S = 5.0
"""Seconds to wait for the other ranks: they notice the failure within moments; torchrun kills after 30 s."""


class LostRanks(RuntimeError):
    """A collective that failed. `missing` lists the ranks that do not respond; it is empty if the network failed."""

    def __init__(self, message: str, missing: list[int]) -> None:
        super().__init__(message)
        self.missing = missing


@contextlib.contextmanager
def closing_or_naming_lost_ranks(world: World, wait_s: float = WAIT_S) -> Iterator[None]:
    """Close `world` at the end of the block, also after an error.

    Raises LostRanks in place of the error of a failed collective. `world` then stays open, because closing NCCL would
    wait for the missing ranks.
    """
    try:
        yield
    except RuntimeError as error:
        if world.world_size > 1 and _is_of_a_collective(error):
            # torchrun sends SIGTERM to the others as soon as one rank is gone: finish the report first.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            missing = find_missing(world, wait_s)
            raise LostRanks(_message(world, missing, wait_s, error), missing) from error
        world.close()
        raise
    except BaseException:
        world.close()
        raise
    world.close()


def find_missing(world: World, wait_s: float) -> list[int]:
    """Return the ranks that do not report within `wait_s` seconds. Every rank that still runs must call it."""
    store = _get_default_store()
    key = "phimini/alive/{}".format
    store.set(key(world.rank), "yes")
    missing = [rank for rank in range(world.world_size) if rank != world.rank]
    deadline = time.monotonic() + wait_s
    while True:
        missing = [rank for rank in missing if not store.check([key(rank)])]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.05)


def _is_of_a_collective(error: RuntimeError) -> bool:
    """Return True for errors of gloo, which are plain RuntimeErrors with a source file in the text, and of NCCL."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _message(world: World, missing: list[int], wait_s: float, error: RuntimeError) -> str:
    reason = str(error).splitlines()[0]
    if not missing:
        return f"rank {world.rank}: a collective failed though every rank is alive: {reason}"
    ranks = ", ".join(map(str, missing))
    return (
        f"rank {ranks} of {world.world_size} gave no sign of life within {wait_s:g} s after a collective failed on rank "
        f"{world.rank}: killed, ended or hanging; the same command goes on from the last checkpoint ({reason})"
    )
