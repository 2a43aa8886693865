"""`phimini bench kernels [op ...] [--static] [--traffic] [--quick] [--json PATH]`.

Without a flag: time every op on the GPU, or, where there is none, on the CPU. `--static` compiles for GPUs that
are not there, `--traffic` counts bytes in the interpreter; both run in a process of their own, because triton
reads TRITON_INTERPRET when a kernel is decorated.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from phimini.bench.gate import rows
from phimini.bench.ops.harness import QUICK, Row, Timing, print_rows, run_case
from phimini.bench.ops.registry import bench_modules


def main(argv: list[str] | None = None) -> int:
    """0; 1 where one of our ops gave a wrong result, or a compiled kernel breaks the static gate."""
    parser = argparse.ArgumentParser(prog="phimini bench kernels", description=__doc__)
    parser.add_argument("ops", nargs="*", help="kernels by name; all without")
    parser.add_argument(
        "--static", action="store_true", help="registers, spills, shared memory; no GPU"
    )
    parser.add_argument(
        "--traffic", action="store_true", help="bytes requested over the minimum; no GPU"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one shape, few rounds, no torch.compile"
    )
    parser.add_argument(
        "--json",
        type=Path,
        help="write the rows here, as a list; *.jsonl: timings for `bench compare`",
    )
    args = parser.parse_args(argv)
    if args.static and args.traffic:
        parser.error("--static and --traffic: one at a time")
    bench_modules(args.ops)  # an unknown op fails before any work
    if args.static:
        return _in_own_process("static_report", [*args.ops, "--check"], args.json, interpret=False)
    if args.traffic:
        return _in_own_process("traffic", args.ops, args.json, interpret=True)
    return _time(args.ops, args.quick, args.json)


def _in_own_process(module: str, argv: list[str], path: Path | None, interpret: bool) -> int:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    json_argument = [] if path is None else ["--json", str(path)]
    command = [sys.executable, "-m", f"phimini.bench.{module}", *argv, *json_argument]
    return subprocess.run(command, env=environment).returncode


def _time(ops: list[str], quick: bool, path: Path | None) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        # one thread: CPU seconds of a thread pool include its waiting
        torch.set_num_threads(1)
    timing = QUICK if quick else Timing()
    torch.manual_seed(0)
    results: list[Row] = []
    for module in bench_modules(ops):
        for case in module.timed_cases(device, quick):
            if quick:
                # which compiles for seconds to minutes
                rest = {k: v for k, v in case.providers.items() if k != "torch.compile"}
                case = dataclasses.replace(case, providers=rest)
            new = run_case(case, timing)
            print_rows(case, new)
            results += new
    if path is not None and path.suffix == ".jsonl":
        rows.write(path, rows_of(results))
    elif path is not None:
        plain = [{k: v for k, v in row.items() if k != "samples"} for row in results]
        path.write_text(json.dumps(plain, indent=1) + "\n")
    wrong = [row for row in results if row["provider"] == "phimini" and row["ms_p50"] is None]
    return 1 if wrong else 0


def rows_of(results: list[Row]) -> list[rows.Row]:
    """The results of `run_case` as comparable rows: ours is held to eager, in CPU time where there is no GPU."""
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
            rows.measured(
                bench="kernels", case=case, provider=provider, unit=unit, samples=mine, correct=bool(mine),
                reference="eager" if reference else None, reference_samples=reference or (),
                peak_bytes=row["peak_extra_bytes"], error=row["max_relative_error"],
                info={k: row[k] for k in ("ms_p20", "ms_p50", "ms_p80", "percent_of_peak")},
            )
        )  # fmt: skip
    return made


if __name__ == "__main__":
    sys.exit(main())
