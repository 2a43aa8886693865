"""`phimini bench all [--quick | --shortest] [--only PART,...] [--json PATH]`.

Every bench, each in a process of its own with one thread, and all rows in one file (default runs/bench/rows.jsonl) for
`phimini bench compare`. A part fails if its command does, if it wrote no row, or if a row of ours is wrong or could
not be compared (fewer rounds than `bench compare` asks for). `static`, `traffic` and `peers` judge themselves and write
rows of their own kind. What a machine cannot run is named and left out.
`--quick` is the quick form of each, minutes on two cores; `--shortest` is what the tests run.
"""

import argparse
import importlib.util
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from phimini.bench.gate.compare import UNDECIDED, compare
from phimini.bench.gate.rows import Row, read, write

TIMEOUT_S = 3600
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Part:
    """`phimini bench COMMAND`: what to add for each form; whether it writes rows or judges itself."""

    command: tuple[str, ...] = ()
    """where it is not the part's name"""
    quick: tuple[str, ...] = ("--quick",)
    shortest: tuple[str, ...] | None = ("--quick",)
    """None: not in this form"""
    full: tuple[str, ...] = ()
    rows: bool = True
    needs: str | None = None
    """a module, or a file of the checkout, without which it cannot run"""
    how: str = "pip install '.[test]'"
    """to get it"""
    may: tuple[int, ...] = (0,)
    """exit statuses that are no failure"""


PARTS: dict[str, Part] = {
    "kernels": Part(shortest=("swiglu", "--quick")),
    "static": Part(command=("kernels", "--static"), quick=("swiglu", "rms_norm"), shortest=("swiglu",), rows=False),
    "traffic": Part(command=("kernels", "--traffic"), quick=("swiglu", "rms_norm"), shortest=("swiglu",), rows=False),
    "data": Part(),
    "train": Part(shortest=("midtrain", "--steps", "5")),
    "rollout": Part(needs="vllm"),
    "sampler": Part(needs="transformers", shortest=None),
    "scaling": Part(shortest=None),
    "weight-sync": Part(needs="vllm", shortest=None),
    # 3: no golden losses are committed for this device; it says so
    "golden": Part(quick=("--layouts", "1,tp2"), shortest=None, rows=False, may=(0, 3)),
    "peers": Part(quick=("sft", "--rounds", "1", "--steps", "2"), shortest=None, rows=False,
                  needs=".venv-peers/bin/python", how="make bench-peers"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    part: str
    rows: list[Row]
    problems: list[str]
    wall_s: float
    cpu_s: float


def run_part(name: str, form: str, folder: Path) -> Outcome:
    """Runs one part. Its output goes to this process's."""
    part = PARTS[name]
    path = folder / f"{name}.jsonl"
    extra = getattr(part, form)
    assert extra is not None, f"{name} has no {form} form"
    words = [*(part.command or (name,)), *extra]
    command = [sys.executable, "-m", "phimini.bench.cli", "bench", *words]
    command += ["--json", str(path)] if part.rows else []
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"--- phimini bench {' '.join(words)}", flush=True)
    status = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=TIMEOUT_S
    ).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    problems = [] if status in part.may else [f"{name}: ended with status {status}"]
    rows = read(path) if part.rows and path.exists() else []
    if part.rows:
        problems += problems_of(name, rows)
    return Outcome(name, rows, problems, time.perf_counter() - start, cpu)


def is_there(needed: str | None) -> bool:
    if needed is None:
        return True
    return (
        (ROOT / needed).exists() if "/" in needed else importlib.util.find_spec(needed) is not None
    )


def problems_of(name: str, rows: list[Row]) -> list[str]:
    """Why these rows could not be held to anything: none of ours, wrong ones, ones without a comparable value."""
    if not any(row.provider == "phimini" for row in rows):
        return [f"{name}: no row of ours was written"]
    return [f"{j.verdict}: {j.key}: {j.text}" for j in compare(rows, rows).judgements
            if j.verdict in ("wrong", *UNDECIDED)]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """0; 1 where a part failed."""
    parser = argparse.ArgumentParser(prog="phimini bench all", description=__doc__)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--quick", dest="form", action="store_const", const="quick", default="full")
    form.add_argument("--shortest", dest="form", action="store_const", const="shortest")
    parser.add_argument("--only", help="some of " + ",".join(PARTS))
    parser.add_argument("--json", type=Path, default=Path("runs/bench/rows.jsonl"))
    args = parser.parse_args(argv)
    names = args.only.split(",") if args.only else list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--only: {unknown[0]}: expected some of {', '.join(PARTS)}")
    names = [name for name in names if getattr(PARTS[name], args.form) is not None]
    left_out = [n for n in names if not is_there(PARTS[n].needs)]
    with tempfile.TemporaryDirectory(prefix="phimini-bench-") as folder:
        outcomes = [run_part(n, args.form, Path(folder)) for n in names if n not in left_out]
    write(args.json, [row for outcome in outcomes for row in outcome.rows])
    print("---")
    for outcome in outcomes:
        said = "failed" if outcome.problems else "ok"
        print(
            f"{outcome.part:12} {said:7} {len(outcome.rows):4} rows  {outcome.wall_s:6.0f} s  {outcome.cpu_s:6.0f} CPU s"
        )
    for name in left_out:
        print(f"{name:12} LEFT OUT: needs {PARTS[name].needs} ({PARTS[name].how})")
    wall, cpu = (sum(getattr(o, clock) for o in outcomes) for clock in ("wall_s", "cpu_s"))
    problems = [problem for outcome in outcomes for problem in outcome.problems]
    print("\n".join([*problems, f"wrote {args.json}; {wall:.0f} s, {cpu:.0f} CPU s"]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
