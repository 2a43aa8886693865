"""The limit of the process or the machine behind an error, how to raise it, and one limit that is checked before a run."""

import os
import re
import resource
import shutil
import tempfile
from pathlib import Path

_MEMORY = re.compile(
    r"^MemoryError|Cannot allocate memory|can't allocate memory|failed to map segment|std::bad_alloc"
)
_FILES = re.compile(r"Too many open files in system|Too many open files")
_SPACE = re.compile(r"^OSError: \[Errno 28\] No space left on device$")
"""without a file: of a semaphore or a shared segment, which are in /dev/shm, or of a temporary file"""
_PROCESSES = re.compile(r"can't start new thread|Resource temporarily unavailable")


OPEN_FILES_OF_RANKS = 64
"""Least number of files that a process of several ranks may open: with 32, torch's store retries for ten minutes."""


def check_open_files() -> None:
    """Raise OSError if this process may open fewer than OPEN_FILES_OF_RANKS files."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= limit < OPEN_FILES_OF_RANKS:
        raise OSError(f"Too many open files: several ranks need more than {OPEN_FILES_OF_RANKS}")


def limit_behind(kind: str, message: str) -> str | None:
    """Return a sentence that names the exhausted limit with its value and the command that raises it, or None.

    kind, message: type name and text of an exception; libraries raise RuntimeError or ImportError for want of memory.
    """
    text = f"{kind}: {message}"
    if found := _FILES.search(text):
        if found[0].endswith("in system"):
            return "raise the machine's limit of open files, sysctl fs.file-max"
        return _of_process("open files", resource.RLIMIT_NOFILE, "ulimit -n", 1)
    if _MEMORY.search(text):
        if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
            return _of_process("KiB of address space", resource.RLIMIT_AS, "ulimit -v", 1024)
        return f"the memory that this process may use is exhausted: {_memory()}"
    if _SPACE.search(text):
        folders = dict.fromkeys(("/dev/shm", tempfile.gettempdir()))
        free = (
            f"{shutil.disk_usage(path).free:,} bytes in {path}"
            for path in folders
            if Path(path).is_dir()
        )
        return f"free for shared memory and temporary files: {', '.join(free)}"
    if _PROCESSES.search(text):
        return _of_process("processes and threads of this user", resource.RLIMIT_NPROC, "ulimit -u", 1)  # fmt: skip
    return None


def _of_process(thing: str, number: int, command: str, unit: int) -> str:
    soft, hard = (
        "unlimited" if limit == resource.RLIM_INFINITY else f"{limit // unit:,}"
        for limit in resource.getrlimit(number)
    )
    return f"raise the limit of {thing}, {command}: it is {soft}, up to {hard} without root"


def _memory() -> str:
    """Return the machine's memory and, inside a container, its limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    group = Path("/sys/fs/cgroup/memory.max")
    limit = group.read_text().strip() if group.is_file() else "max"
    machine = f"the machine has {total / 2**30:.1f} GiB"
    return machine if limit == "max" else f"{machine}, this container {int(limit) / 2**30:.1f} GiB"
