"""Time every op on the GPU, or on the CPU of a machine without one.

`--static` compiles the kernels for GPUs that are not there, `--traffic` counts bytes in the interpreter. Both run in a
process of their own, because Triton reads TRITON_INTERPRET when a kernel is decorated.
"""

import dataclasses
import os
import subprocess
import sys
import traceback
from pathlib import Path

import torch

from phimini.bench.gate import rows
from phimini.bench.gate.options import finish, parser
from phimini.bench.ops.harness import QUICK, Row, Timing, print_rows, run_case
from phimini.bench.ops.registry import bench_modules


def main(argv: list[str] | None = None) -> int:
    """Return 0; 1 where one of our ops is wrong, or a compiled kernel breaks the static gate."""
    options = parser("kernels", __doc__)
    options.add_argument("ops", nargs="*", help="kernels by name; default: all")
    options.add_argument("--static", action="store_true", help="registers, spills, shared memory; no GPU")  # fmt: skip
    options.add_argument("--traffic", action="store_true", help="bytes requested over the minimum; no GPU")  # fmt: skip
    options.add_argument("--quick", action="store_true", help="one shape, few rounds, no torch.compile")  # fmt: skip
    options.add_argument("--compile", action="store_true", help="with --quick: torch.compile too")
    args = options.parse_args(argv)
    if args.static and args.traffic:
        options.error("--static and --traffic: one at a time")
    bench_modules(args.ops)  # an unknown op fails before any work
    if args.static:
        return _in_own_process("static_report", [*args.ops, "--check"], args.json, interpret=False)
    if args.traffic:
        return _in_own_process("traffic", args.ops, args.json, interpret=True)
    return _time(args.ops, args.quick, args.compile, args.json)


def _in_own_process(module: str, argv: list[str], path: Path | None, interpret: bool) -> int:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    json_argument = [] if path is None else ["--json", str(path)]
    command = [sys.executable, "-m", f"phimini.bench.offline.{module}", *argv, *json_argument]
    return subprocess.run(command, env=environment).returncode


def _time(ops: list[str], quick: bool, compiled: bool, path: Path | None) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        # one thread: CPU seconds of a thread pool include its waiting
        torch.set_num_threads(1)
    timing = QUICK if quick else Timing()
    torch.manual_seed(0)
    results: list[Row] = []
    failed = False
    for module in bench_modules(ops):
        for case in module.timed_cases(device, quick):
            if quick and not compiled:
                # torch.compile takes seconds to minutes per case
                rest = {k: v for k, v in case.providers.items() if k != "torch.compile"}
                case = dataclasses.replace(case, providers=rest)
            try:
                new = run_case(case, timing)
            except Exception:
                # Of any provider's library. It is told, and makes the status 1; the other cases are worth their time.
                traceback.print_exc()
                print(f"{case.op} {case.shape}: FAILED", flush=True)
                failed = True
                continue
            print_rows(case, new)
            results += new
            _save(path, results)  # a bench that is stopped leaves the rows so far
    return _save(path, results) or int(failed)


def _save(path: Path | None, results: list[Row]) -> int:
    plain = [{k: v for k, v in row.items() if k != "samples"} for row in results]
    return finish(path, rows_of(results), plain)


def rows_of(results: list[Row]) -> list[rows.Row]:
    """Return the results of `run_case` as comparable rows; our reference provider is eager.

    The unit is device time on a GPU and CPU time elsewhere.
    """
    unit, clock = ("ms", 0) if torch.cuda.is_available() else ("cpu_ms", 1)
    factor = {"ms": 1.0, "cpu_ms": 1e3}[unit]

    def case_of(row: Row) -> dict[str, str | int | float | bool]:
        return {k: row[k] for k in ("op", "pass", "dtype")} | row["shape"]

    samples = {
        (str(case_of(row)), row["provider"]): [factor * s[clock] for s in row["samples"]]
        for row in results
    }
    made = []
    for row in results:
        case, provider = case_of(row), row["provider"]
        mine = samples[str(case), provider]
        reference = samples.get((str(case), "eager")) if provider == "phimini" and mine else None
        made.append(
            rows.Row(
                bench="kernels", case=case, provider=provider, unit=unit, samples=mine, correct=bool(mine),
                reference="eager" if reference else None, reference_samples=reference or [],
                peak_bytes=row["peak_extra_bytes"], error=row["max_relative_error"],
                info={k: row[k] for k in ("ms_p20", "ms_p50", "ms_p80", "percent_of_peak")},
            )
        )  # fmt: skip
    return made


if __name__ == "__main__":
    sys.exit(main())
