"""Repair of Triton's interpreter for the tests of a process, at import (see phimini.bench.offline.interpreter)."""

import torch

from phimini.bench.offline.interpreter import (
    OutOfBoundsError,
    RaceError,
    Report,
    install,
    observe,
    uninstall,
)

__all__ = ["OutOfBoundsError", "RaceError", "Report", "install", "observe", "uninstall"]

if not torch.cuda.is_available():
    install()
