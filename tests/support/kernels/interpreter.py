"""Repair of Triton's interpreter for the tests of a process, at import (see phimini.bench.offline.interpreter)."""

from typing import Any

import pytest
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


def _skip(**_: Any) -> Any:
    # Compiled kernels leave no record of their loads; the same test observes them wherever there is no GPU.
    pytest.skip("kernels run on the GPU here, which no interpreter observes")


if torch.cuda.is_available():
    globals()["observe"] = _skip
else:
    install()
