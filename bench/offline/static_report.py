"""Compile kernels for GPUs that are not there, and report registers, spills and instructions.

    python -m phimini.bench.offline.static_report [op ...] [--json PATH] [--check]

Needs triton's wheel alone (it brings ptxas, cuobjdump and nvdisasm), no GPU and no driver. Each bench file
lists its kernels in `static_cases()`, and other projects' in `peer_static_cases()`, with the arguments of a real launch on
Phi-4-Mini's shapes: triton specialises on them (an int divisible by 16 turns 16-bit accesses into 128-bit ones).

Columns: registers per thread; spills, instructions that read or write local memory; shared_bytes per program;
mma, the tensor-core instruction (on sm_100 with its PTX name, tcgen05); global_access_bits, the width through
which most bytes of global memory pass per instruction (TMA counts as 128, its unit being 16 bytes);
occupancy, resident warps over the chip's, by registers, warps and shared memory alone.

The report does not cover time: L2, latencies, or how a grid fills the chip.
"""

import argparse
import collections
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from phimini.bench.ops.cases import StaticCase
from phimini.bench.ops.registry import bench_modules, cases_of
from phimini.model.io.json_files import write_json


@dataclass(frozen=True, slots=True)
class _Chip:
    """Limits of one SM (CUDA C++ programming guide, table of compute capabilities)."""

    warps: int
    registers: int
    shared_bytes: int
    shared_bytes_per_program: int
    programs: int


_CHIPS = {
    80: _Chip(64, 65536, 164 * 1024, 163 * 1024, 32),
    90: _Chip(64, 65536, 228 * 1024, 227 * 1024, 32),
    100: _Chip(64, 65536, 228 * 1024, 227 * 1024, 32),
}
_MMA = {80: r"HMMA\S*", 90: r"HGMMA\S*|HMMA\S*", 100: r"UTC\w*MMA\S*|HMMA\S*"}
_FAST_MMA = {80: "HMMA", 90: "HGMMA", 100: "tcgen05"}


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticRow:
    kernel: str
    provider: str
    target: str
    config: dict[str, int | bool]
    registers: int
    spills: int
    shared_bytes: int
    mma: str | None
    global_access_bits: int
    occupancy: float


def compile_case(case: StaticCase, target: int) -> StaticRow:
    """Compile for one target (80, 90, 100) and read the result."""
    function = case.function
    while hasattr(function, "fn") and not hasattr(function, "arg_names"):
        function = function.fn
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        if name in case.constexprs:
            signature[name], constexprs[(i,)] = "constexpr", case.constexprs[name]
            continue
        if name not in case.signature:
            raise ValueError(f"StaticCase {case.kernel}: no type for argument {name!r}")
        kind, _, divisor = case.signature[name].partition(":")
        signature[name] = kind
        is_aligned = kind.startswith("*") and not function.params[i].do_not_specialize_on_alignment
        if divisor or is_aligned:
            attributes[(i,)] = [["tt.divisibility", int(divisor or 16)]]
    source = ASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    registers, instructions = _disassemble(compiled.asm["cubin"])
    counts = collections.Counter(instructions)
    shared = compiled.metadata.shared
    # warp specialisation adds warps that metadata.num_warps does not count
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", compiled.asm["ptx"])
    num_warps = int(threads.group(1)) // 32 if threads else case.num_warps
    return StaticRow(
        kernel=case.kernel,
        provider=case.provider,
        target=f"sm_{target}",
        config=_config(case),
        registers=registers,
        spills=sum(n for name, n in counts.items() if name.startswith(("LDL", "STL"))),
        shared_bytes=shared,
        mma=_mma(counts, target),
        global_access_bits=_global_access_bits(counts),
        occupancy=round(_occupancy(_CHIPS[target], registers, num_warps, shared), 3),
    )


def violations(case: StaticCase, row: StaticRow) -> list[str]:
    """Describe each limit of the static gate that this row breaks."""
    target = int(row.target.removeprefix("sm_"))
    limit, ceiling = _CHIPS[target].shared_bytes_per_program, case.max_registers.get(target)
    found = []
    if row.spills:
        found.append(f"{row.spills} spill instructions, expected 0")
    if row.shared_bytes > limit:
        found.append(f"{row.shared_bytes} bytes of shared memory, the chip has {limit}")
    if row.global_access_bits < case.access_bits:
        found.append(
            f"global accesses of {row.global_access_bits} bits, expected {case.access_bits} or TMA"
        )
    if ceiling is None:
        found.append("no committed ceiling of registers for this target")
    elif row.registers > ceiling:
        found.append(f"{row.registers} registers, the ceiling is {ceiling}")
    if case.is_matmul and _FAST_MMA[target] not in (row.mma or ""):
        found.append(f"tensor-core instruction {row.mma}, expected {_FAST_MMA[target]}")
    return [f"{row.kernel} {row.target} [{_config_text(row)}]: {text}" for text in found]


def _config(case: StaticCase) -> dict[str, int | bool]:
    """Return a launch's choices: block sizes and flags (upper case), pointers that are None (0), warps, stages."""
    chosen = {k: v for k, v in case.constexprs.items() if k.isupper() and isinstance(v, int)}
    chosen |= {k: False for k, v in case.constexprs.items() if v is None}
    return chosen | {"num_warps": case.num_warps, "num_stages": case.num_stages}


def _config_text(row: StaticRow) -> str:
    return " ".join(f"{k}={int(v)}" for k, v in row.config.items())


def _disassemble(cubin: bytes) -> tuple[int, list[str]]:
    """Return the registers per thread, and the instruction names of the kernel's SASS."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run(
                [str(tools / tool[0]), *tool[1:], file.name],
                capture_output=True,
                text=True,
                check=True,
            )
            for tool in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers = re.search(r"\bREG:(\d+)", usage.stdout + usage.stderr)
    assert registers is not None, f"cuobjdump printed no register count: {usage.stdout[:300]}"
    line = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
    return int(registers.group(1)), [
        m.group(1) for m in map(line.match, sass.stdout.splitlines()) if m
    ]


def _mma(counts: collections.Counter, target: int) -> str | None:
    names = {n: c for n, c in counts.items() if re.fullmatch(_MMA[target], n)}
    if not names:
        return None
    name = max(names, key=lambda n: (not n.startswith("HMMA"), names[n]))
    return f"tcgen05.mma ({name})" if name.startswith("UTC") else name


def _global_access_bits(counts: collections.Counter) -> int:
    """Return the access width that carries most of the bytes; 128 for TMA, which moves whole tiles."""
    bits: collections.Counter = collections.Counter()
    for name, count in counts.items():
        if re.match(r"UTMA(LDG|STG|RED)|UBLKCP", name):
            return 128
        if re.match(r"(LDG|STG|LDGSTS|RED|ATOMG)\b", name.split(".")[0]):
            width = next((w for w in (256, 128, 64) if str(w) in name.split(".")), None)
            if width is None:
                width = 16 if {"U16", "S16"} & set(name.split(".")) else 32
                width = 8 if {"U8", "S8"} & set(name.split(".")) else width
            bits[width] += width * count
    return max(bits, key=lambda w: bits[w]) if bits else 0


def _occupancy(chip: _Chip, registers: int, num_warps: int, shared_bytes: int) -> float:
    if shared_bytes > chip.shared_bytes_per_program:
        return 0.0
    registers_per_warp = math.ceil(registers * 32 / 256) * 256  # allocated 256 at a time
    # the system takes 1 KiB of shared memory per program
    shared = math.ceil((shared_bytes + 1024) / 128) * 128
    programs = min(
        chip.warps // num_warps,
        chip.registers // registers_per_warp // num_warps,
        chip.shared_bytes // shared,
        chip.programs,
    )
    return programs * num_warps / chip.warps


def all_cases(ops: Iterable[str] = (), peers: bool = True) -> list[StaticCase]:
    """Return the cases of the named ops, or of all, each op's own kernels before other projects'."""
    cases = []
    for module in bench_modules(ops):
        cases += cases_of(module, "static_cases")
        cases += cases_of(module, "peer_static_cases") if peers else []
    return cases


_work: list[tuple[StaticCase, int]] = []  # the worker processes inherit it


def _compile_number(i: int) -> StaticRow:
    return compile_case(*_work[i])


def report(cases: Iterable[StaticCase], jobs: int = 1) -> Iterator[tuple[StaticCase, StaticRow]]:
    """Compile each case for each of its targets, `jobs` at a time; rows come in order."""
    _work[:] = [(case, target) for case in cases for target in case.targets]
    # forked, because a kernel cannot be sent to another process
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        rows = pool.imap(_compile_number, range(len(_work)))
        yield from ((case, row) for (case, _target), row in zip(_work, rows, strict=True))


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table below a line with the version of triton."""
    lines = [
        f"Compiled offline with triton {triton.__version__}, not run; a ceiling of registers per kernel and target "
        "stands in each bench file. Made by `python -m phimini.bench.offline.static_report --markdown bench/results/static.md`.",
        "",
    ]
    columns = list(rows[0]) if rows else []
    lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        config = " ".join(f"{k}={int(v)}" for k, v in row["config"].items())
        cells = [config if name == "config" else str(row[name]) for name in columns]
        lines.append("| " + " | ".join(cells).replace("None", "-") + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Return 0, or with --check 1 where one of our kernels breaks the static gate."""
    parser = argparse.ArgumentParser(prog="phimini.bench.offline.static_report")
    parser.add_argument("ops", nargs="*", help="kernel files by name; all without")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--markdown", type=Path, help="write the rows here as a table")
    parser.add_argument("--ours", action="store_true", help="leave other projects' kernels out")
    parser.add_argument(
        "--check", action="store_true", help="fail where our kernels break the gate"
    )
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError(
            "static_report: TRITON_INTERPRET=1 is set; kernels would not be compiled"
        )
    rows, broken = [], []
    header = f"{'kernel':26} {'provider':9} {'target':7} {'regs':>4} {'spills':>6} {'shared':>7} {'access':>6} {'occup.':>6}  mma, config"
    print(header)
    cases = all_cases(args.ops, peers=not args.ours)
    for case, row in report(cases, jobs=min(8, os.cpu_count() or 1)):
        rows.append(asdict(row))
        if case.provider == "phimini":
            broken += violations(case, row)
        print(
            f"{row.kernel:26} {row.provider:9} {row.target:7} {row.registers:4} {row.spills:6} "
            f"{row.shared_bytes:7} {row.global_access_bits:6} {row.occupancy:6.2f}  {row.mma or '-'}  {_config_text(row)}",
            flush=True,
        )
    if args.json:
        write_json(args.json, rows)
    if args.markdown:
        args.markdown.write_text(markdown_table(rows))
    for text in broken:
        print(f"GATE {text}", file=sys.stderr)
    return 1 if args.check and broken else 0


if __name__ == "__main__":
    sys.exit(main())
