"""Facts of the machine that a process runs on."""

import platform
import re
from pathlib import Path


def cpu_name() -> str:
    """Return the processor's model name, or its architecture where the system does not name it."""
    return _cpuinfo("model name") or platform.machine()


def cpu_generation() -> str:
    """Return the processor's name with its family and model numbers.

    A virtual machine may shorten the name ("AMD EPYC"); the numbers still tell generations apart.
    """
    name, family, model = (_cpuinfo(field) for field in ("model name", "cpu family", "model"))
    return f"{name} family {family} model {model}" if name and family and model else cpu_name()


def _cpuinfo(field: str) -> str | None:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(rf"^{field}\s*: (.*)$", text, re.MULTILINE)
    return found.group(1).strip() if found else None
