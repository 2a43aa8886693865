"""The bench file of every kernel: same stem as the kernel's, found by looking.

A bench file `bench/<stem>.py` offers
    timed_cases(device, quick) -> list[harness.Case]            what `phimini bench kernels` times
and, where there is something of that kind,
    static_cases() -> list[static_report.StaticCase]            what `--static` compiles: ours,
    peer_static_cases() -> list[static_report.StaticCase]       and other projects' kernels beside it
    traffic_cases() -> list[traffic.TrafficCase]                what `--traffic` counts
"""

import importlib
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import phimini.kernels


def op_names() -> list[str]:
    """The stems of kernels/*.py, private files left out."""
    folder = Path(str(phimini.kernels.__file__)).parent
    return sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))


def bench_modules(ops: Iterable[str] = ()) -> list[ModuleType]:
    """The bench files of `ops`, or of every kernel. ValueError names an op that does not exist."""
    known = op_names()
    chosen = list(ops) or known
    for op in chosen:
        if op not in known:
            raise ValueError(f"bench kernels: unknown op {op!r}; expected one of {known}")
    return [importlib.import_module(f"phimini.bench.{op}") for op in chosen]


def cases_of(module: ModuleType, kind: str) -> list:
    """What `module` offers under one of the names above; none where it does not."""
    return getattr(module, kind, list)()
