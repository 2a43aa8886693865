"""The bytes that an op requests from memory, over the least possible, counted without a GPU.

    TRITON_INTERPRET=1 python -m phimini.bench.offline.traffic [op ...] [--json PATH]

Triton kernels run in the repaired interpreter, which counts the bytes of every load, store and atomic. A dispatch mode
counts the bytes that torch's own operations read and write (a GEMM: each operand once). This covers whole ops, ours and
other projects'.

Requested bytes are more than the traffic of HBM: caches are not modelled. A weight that every program reads again comes
from L2 on a GPU and counts each time here.
"""

import argparse
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from phimini.bench.offline import interpreter
from phimini.bench.ops.cases import TrafficCase
from phimini.bench.ops.registry import bench_modules, cases_of
from phimini.model.io.json_files import write_json

# operations that move no data
_FREE = {
    "view", "_unsafe_view", "t", "transpose", "slice", "detach", "unsqueeze", "squeeze", "expand", "select",
    "as_strided", "permute", "alias", "split", "split_with_sizes", "chunk", "unbind", "empty", "empty_like",
    "empty_strided", "new_empty", "new_empty_strided", "set_", "_local_scalar_dense", "lift_fresh", "_reshape_alias",
}  # fmt: skip
_WRITE_ONLY = {
    "zero_",
    "fill_",
    "zeros",
    "new_full",
    "ones",
    "full",
    "zeros_like",
    "ones_like",
    "full_like",
    "arange",
}
# operations that read as many bytes of their source as they write
_GATHERS = {"index", "index_select", "gather", "embedding"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficRow:
    kernel: str
    provider: str
    requested_bytes: int
    minimum_bytes: int
    ratio: float


class TorchTraffic(TorchDispatchMode):
    """Count the bytes that torch's operations read and write while this mode is active."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0
        self.by_operation: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace not in ("aten", "prims"):
            with self:  # a custom op: count its implementation's operations
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        # Inside a custom op torch does not decompose composite operations (reshape, to).
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        if name not in _FREE:
            moved = _moved_bytes(name, (args, kwargs), result)
            self.num_bytes += moved
            self.by_operation[name] = self.by_operation.get(name, 0) + moved
        return result


def _moved_bytes(name: str, inputs: Any, result: Any) -> int:
    tensors = list({id(t): t for t in tree_leaves(inputs) if isinstance(t, torch.Tensor)}.values())
    written = sum(
        _bytes(t)
        for t in {id(t): t for t in tree_leaves(result) if isinstance(t, torch.Tensor)}.values()
    )
    if name in _WRITE_ONLY:
        return written
    if name == "copy_":
        return written + _bytes(tensors[-1])
    if name in _GATHERS:
        return 2 * written + sum(_bytes(t) for t in tensors[1:])
    return written + sum(_bytes(t) for t in tensors)


def _bytes(t: torch.Tensor) -> int:
    """Return the bytes of the stored elements: those of an expanded tensor count once."""
    elements = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        elements *= size if stride != 0 else 1
    return (elements if t.numel() else 0) * t.element_size()


def count(case: TrafficCase) -> TrafficRow:
    """Run the case once in the interpreter and count. Races do not stop a peer's kernel."""
    interpreter.install()
    with interpreter.observe(races="record") as report, TorchTraffic() as torch_traffic:
        case.run()
    requested = torch_traffic.num_bytes + sum(n.requested_bytes for n in report.launches)
    return TrafficRow(
        kernel=case.kernel,
        provider=case.provider,
        requested_bytes=requested,
        minimum_bytes=case.minimum_bytes,
        ratio=round(requested / case.minimum_bytes, 4),
    )


def all_cases(ops: Iterable[str] = ()) -> list[TrafficCase]:
    """Return the cases of the named ops, or of all. Some launch kernels while they are made."""
    interpreter.install()
    return [case for module in bench_modules(ops) for case in cases_of(module, "traffic_cases")]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="phimini.bench.offline.traffic")
    parser.add_argument("ops", nargs="*", help="kernel files by name; all without")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "traffic: set TRITON_INTERPRET=1, which is read when kernels are decorated"
        )
    rows = []
    print(f"{'kernel':26} {'provider':9} {'requested':>12} {'minimum':>12} {'ratio':>8}")
    for case in all_cases(args.ops):
        row = count(case)
        rows.append(asdict(row))
        print(
            f"{row.kernel:26} {row.provider:9} {row.requested_bytes:12} {row.minimum_bytes:12} {row.ratio:8.2f}",
            flush=True,
        )
    if args.json:
        write_json(args.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
