"""Temporary folder of a vLLM engine, removed at its end or, if it was killed, by the next engine."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX = "phimini-vllm-"


@contextmanager
def engine_folder() -> Iterator[Path]:
    """Make a temporary folder for the engine's config and, as VLLM_RPC_BASE_PATH, its sockets; remove it at the end.

    Its owner holds a lock on it, which the kernel releases when the process is killed. Unlike a process id, that
    works between containers too.
    """
    remove_abandoned()
    new = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}"))
    lock = _locked(new)
    folder = new.rename(new.with_name(new.name[1:]))  # under this name others look at it
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def remove_abandoned() -> None:
    """Remove the folders of engines that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        lock = _locked(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """Return an open file that holds the folder's lock, or None if another process holds it or it has no locks."""
    try:
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock
