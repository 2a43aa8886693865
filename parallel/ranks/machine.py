"""Facts about the machine that a process runs on."""

import platform
import re
from pathlib import Path


def cpu_name() -> str:
    """Return the processor's model name, or the machine's architecture where the system hides it."""
    return _cpuinfo().get("model name") or platform.machine()


def cpu_generation() -> str:
    """Return the processor's name, family and model number.

    A virtual machine may cut the name ("AMD EPYC"); family and model still tell the generation.
    """
    facts = _cpuinfo()
    if not {"model name", "cpu family", "model"} <= facts.keys():
        return platform.processor() or platform.machine()
    return f"{facts['model name']} family {facts['cpu family']} model {facts['model']}"


def _cpuinfo() -> dict[str, str]:
    """Return the fields of the first processor; empty on systems without /proc/cpuinfo."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    first = text.split("\n\n")[0]
    return dict(re.findall(r"^(.+?)\s*: (.*)$", first, re.M))
