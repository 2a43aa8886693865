"""Run every bench, each in a process of its own with one thread, and write all rows to one file for `bench compare`.

A part fails if its command does, if it writes no row, or if a row of ours is wrong or cannot be compared (fewer rounds
than `bench compare` asks for). `static`, `traffic` and `peers` check themselves and write rows of another kind. A part
that this machine cannot run is named and left out.
`--quick` runs the quick form of each (minutes on two cores), `--shortest` the form that the tests run.
"""

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
from phimini.bench.gate.options import output_file, parser
from phimini.bench.gate.rows import Row, read, write

TIMEOUT_S = 3600
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Part:
    """One bench command: the arguments of each form, and its requirements."""

    command: tuple[str, ...] = ()
    """where it is not the part's name"""
    quick: tuple[str, ...] = ("--quick",)
    shortest: tuple[str, ...] | None = ("--quick",)
    """None: not in this form"""
    full: tuple[str, ...] = ()
    rows: bool = True
    """writes rows; else the command checks itself"""
    needs: str | None = None
    """a module, or a file of the checkout, without which it cannot run"""
    how: str = "pip install '.[test]'"
    """the command that provides `needs`"""
    may: tuple[int, ...] = (0,)
    """exit statuses that are not failures"""


PARTS: dict[str, Part] = {
    "kernels": Part(shortest=("swiglu", "--quick")),
    "static": Part(command=("kernels", "--static"), quick=("swiglu", "rms_norm"), shortest=("swiglu",), rows=False),
    "traffic": Part(command=("kernels", "--traffic"), quick=("swiglu", "rms_norm"), shortest=("swiglu",), rows=False),
    "data": Part(),
    "train": Part(shortest=("midtrain", "--steps", "5")),
    "rollout": Part(needs="vllm"),
    "scaling": Part(shortest=None),
    "weight-sync": Part(needs="vllm", shortest=None),
    # 3: no golden losses are committed for this device, which the command prints
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
    """Run one part in the form full, quick or shortest. Its output goes to this process's."""
    part, path = PARTS[name], folder / f"{name}.jsonl"
    words = [*(part.command or (name,)), *getattr(part, form)]
    words += ["--json", str(path)] if part.rows else []
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"--- phimini bench {' '.join(words)}", flush=True)
    status = subprocess.run(
        [sys.executable, "-m", "phimini.bench.cli", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=TIMEOUT_S,
    ).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    problems = [] if status in part.may else [f"{name}: ended with status {status}"]
    rows = read(path) if part.rows and path.exists() else []
    problems += problems_of(name, rows) if part.rows else []
    return Outcome(name, rows, problems, time.perf_counter() - start, cpu)


def is_there(needed: str | None) -> bool:
    if needed is None:
        return True
    if "/" in needed:
        return (ROOT / needed).exists()
    return importlib.util.find_spec(needed) is not None


def problems_of(name: str, rows: list[Row]) -> list[str]:
    """Describe the reasons why these rows cannot be compared with a baseline."""
    if not any(row.provider == "phimini" for row in rows):
        return [f"{name}: no row of ours was written"]
    found = compare(rows, rows).judgements
    return [f"{j.verdict}: {j.key}: {j.text}" for j in found if j.verdict in ("wrong", *UNDECIDED)]


def main(argv: list[str] | None = None) -> int:
    """Return 0; 1 where a part failed."""
    options = parser("all", __doc__, json=False)
    form = options.add_mutually_exclusive_group()
    form.add_argument("--quick", dest="form", action="store_const", const="quick", default="full")
    form.add_argument("--shortest", dest="form", action="store_const", const="shortest")
    options.add_argument("--only", help="some of " + ",".join(PARTS))
    options.add_argument("--json", type=output_file, default="runs/bench/rows.jsonl")
    args = options.parse_args(argv)
    names = args.only.split(",") if args.only else list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        options.error(f"--only: {unknown[0]}: expected some of {', '.join(PARTS)}")
    names = [name for name in names if getattr(PARTS[name], args.form) is not None]
    left_out = [n for n in names if not is_there(PARTS[n].needs)]
    with tempfile.TemporaryDirectory(prefix="phimini-bench-") as folder:
        outcomes = [run_part(n, args.form, Path(folder)) for n in names if n not in left_out]
    write(args.json, [row for outcome in outcomes for row in outcome.rows])
    print("---")
    for o in outcomes:
        word = "failed" if o.problems else "ok"
        print(f"{o.part:12} {word:7} {len(o.rows):4} rows  {o.wall_s:6.0f} s  {o.cpu_s:6.0f} CPU s")
    for name in left_out:
        print(f"{name:12} LEFT OUT: needs {PARTS[name].needs} ({PARTS[name].how})")
    problems = [problem for outcome in outcomes for problem in outcome.problems]
    print("\n".join([*problems, f"wrote {args.json}"]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
