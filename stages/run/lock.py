"""Lock on a run's folder: one command at a time. The kernel releases it when the process ends, however it ends."""

import errno
import fcntl
import os
import socket
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phimini.parallel.ranks.world import World, on_main
from phimini.stages.run.remains import remove_remains

LOCK_FILE = ".lock"
WAIT_S = 2.0
"""before a command gives up: a run that was killed a moment ago may still be ending"""


class RunLock:
    """The lock on a run's folder, as a context manager.

    It is `flock` on an open file of the folder, which Linux also keeps between machines over NFS. The file stays; its
    text says which process has the lock, or had it last. A fork would keep the lock alive after its parent's
    death, so a forked child closes the file; a program started by exec does not inherit it.
    """

    def __init__(self, out: str | Path, *, make: bool = False) -> None:
        """make: create a missing folder; without it a missing folder is not locked."""
        self._make = make
        self.path = Path(out) / LOCK_FILE
        self._file: int | None = None
        _locks.add(self)

    def acquire(self, wait_s: float = WAIT_S) -> None:
        """Lock the folder, and remove the files that a killed command left there.

        Raises OSError that names process and host if another process still holds the lock after `wait_s` seconds, or if the
        folder is not writable.
        """
        if self._make:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.parent.exists():
            return
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if self._locked(file, wait_s):
                remove_remains(self.path.parent)
                os.ftruncate(file, 0)
                os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        except BaseException:
            os.close(file)
            raise
        self._file = file

    def _locked(self, file: int, wait_s: float) -> bool:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    holder = os.pread(file, 200, 0).decode("utf-8", "replace") or "another process"
                    raise OSError(
                        f"{self.path.parent} is in use by {holder}: wait for it, stop it, or choose another out="
                    ) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    raise
                print(f"phimini: {self.path}: {error.strerror}: nothing keeps a second run out of this folder", file=sys.stderr, flush=True)  # fmt: skip
                return False
            time.sleep(0.05)

    def release(self) -> None:
        """Release the lock."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> "RunLock":
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


_locks: "weakref.WeakSet[RunLock]" = weakref.WeakSet()


def _close_in_child() -> None:
    for lock in list(_locks):
        lock.release()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def held_by_main(world: World, out: str | Path, *, make: bool = False) -> Iterator[None]:
    """Hold the lock in rank 0; a refusal is raised on every rank. Collective."""
    lock = RunLock(out, make=make)
    on_main(world, lock.acquire)
    try:
        yield
    finally:
        lock.release()
