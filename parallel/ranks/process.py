"""Relations between processes: the condition for a fork, and signals to and from the parent."""

import ctypes
import os
import signal
import sys

import torch

_PR_SET_PDEATHSIG = 1
process_group_joined = False
"""Set by `world.initialize`: gloo's threads do not survive a fork, and a child would wait for them for ever."""


class LostWorkerError(RuntimeError):
    """Error of a rank whose worker process was killed."""

    def __init__(self, field: str, does: str) -> None:
        """field: the setting that started the worker. does: its work, as in `scores answers`."""
        super().__init__(f"{field}: a process that {does} died; `dmesg` tells whether memory ran out")  # fmt: skip


def can_fork() -> bool:
    """Return False once CUDA or a process group is in use: neither survives a fork."""
    return not process_group_joined and not torch.cuda.is_initialized()


def end_with_parent() -> None:
    """Let the kernel kill this child process when the thread that started it ends. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def end_job_without_restart() -> None:
    """Ask torchrun, if it would restart this rank, to end the job: the same bad input would come again.

    torchrun restarts after every exit status but 0. It ends all ranks, and starts none, on SIGTERM.
    """
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        os.kill(os.getppid(), signal.SIGTERM)
