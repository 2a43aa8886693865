"""The bench file of every kernel, which has the kernel's stem: `bench/ops/<stem>.py`.

Each one has
    timed_cases(device, quick) -> list[harness.Case]       the cases of `phimini bench kernels`
and may have
    static_cases() -> list[cases.StaticCase]               the kernels that `--static` compiles
    peer_static_cases() -> list[cases.StaticCase]          other projects' kernels for the same work
    traffic_cases() -> list[cases.TrafficCase]             the calls whose bytes `--traffic` counts
"""

import importlib
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import phimini.kernels


def op_names() -> list[str]:
    """Return the stems of kernels/*.py without private files, and without the file that has no op of its own."""
    folder = Path(str(phimini.kernels.__file__)).parent
    stems = {p.stem for p in folder.glob("*.py") if not p.stem.startswith("_")}
    return sorted(stems - {"transformers_model"})


def bench_modules(ops: Iterable[str] = ()) -> list[ModuleType]:
    """Return the bench modules of `ops`, or of every kernel. ValueError names an unknown op."""
    known = op_names()
    chosen = list(ops) or known
    for op in chosen:
        if op not in known:
            raise ValueError(f"unknown op {op!r}; expected one of {known}")
    return [importlib.import_module(f"phimini.bench.ops.{op}") for op in chosen]


def cases_of(module: ModuleType, kind: str) -> list:
    """Return the cases of one of the kinds above; an empty list for a module without that kind."""
    return getattr(module, kind, list)()
