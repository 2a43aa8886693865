"""Who is missing: when a collective fails, the ranks that still can answer in the job's store, and the others are named

A rank that was killed closes its connections, and one that hangs lets a collective's deadline pass
(`world.initialize(timeout_s=)`); either way what the others see is an error of gloo's or NCCL's that names no rank.
The store is served by torchrun's agent or by `launch.run_ranks`, which outlive every rank.
"""

import contextlib
import signal
import time
from collections.abc import Iterator

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from phimini.parallel.ranks.world import World

WAIT_S = 5.0
"""how long the others have to answer: they meet the failure within moments of each other; torchrun kills after 30 s"""


class LostRanks(RuntimeError):
    """A collective failed. `missing`: the ranks that did not answer; none if it was the network between them."""

    def __init__(self, message: str, missing: list[int]) -> None:
        super().__init__(message)
        self.missing = missing


@contextlib.contextmanager
def closing_or_naming_lost_ranks(world: World, wait_s: float = WAIT_S) -> Iterator[None]:
    """Closes `world` at the end, also after an error; but a failed collective within leaves as LostRanks, and `world`
    open: NCCL would wait for the missing."""
    try:
        yield
    except RuntimeError as error:
        if world.world_size > 1 and _is_of_a_collective(error):
            # torchrun ends the others as soon as one is gone: not before they have said which.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            missing = absent(world, wait_s)
            raise LostRanks(_message(world, missing, wait_s, error), missing) from error
        world.close()
        raise
    except BaseException:
        world.close()
        raise
    world.close()


def absent(world: World, wait_s: float) -> list[int]:
    """The ranks that do not answer within `wait_s`; to be called by every rank that can."""
    store = _get_default_store()
    key = "phimini/roll_call/{}".format
    store.set(key(world.rank), "here")
    missing = [rank for rank in range(world.world_size) if rank != world.rank]
    deadline = time.monotonic() + wait_s
    while True:
        missing = [rank for rank in missing if not store.check([key(rank)])]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.05)


def _is_of_a_collective(error: RuntimeError) -> bool:
    """gloo raises a plain RuntimeError, with its source file in the text."""
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
