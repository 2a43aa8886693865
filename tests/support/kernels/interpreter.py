"""Importing this repairs Triton's interpreter for the tests of a process (see phimini.bench.offline.interpreter)."""

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
