"""The static gate: what the compiler makes of every shipped kernel, for GPUs that are not here.

Kernels are compiled in processes of their own: in this one TRITON_INTERPRET=1 may be set.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

import phimini.kernels
from phimini.bench.offline.static_report import all_cases, markdown_table

ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
COLUMNS = [
    "kernel", "provider", "target", "config", "registers", "spills", "shared_bytes", "mma",
    "global_access_bits", "occupancy",
]  # fmt: skip

PLANTED = """
import json, sys
import triton
import triton.language as tl
from phimini.bench.offline.static_report import compile_case, violations
from phimini.bench.ops.cases import StaticCase

@triton.jit
def copy(x_ptr, y_ptr, stride, BLOCK: tl.constexpr):
    i = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i) * 2)

@triton.jit
def matmul(a_ptr, b_ptr, c_ptr, D, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    c = tl.zeros((M, N), tl.float32)
    for first in range(0, D, K):
        a = tl.load(a_ptr + m * D + first + k[None, :])
        b = tl.load(b_ptr + n * D + first + k[:, None])
        c = tl.dot(a, b, c)
    tl.store(c_ptr + m * N + n, c)

def case(name, function, signature, constexprs, warps=4, stages=3, ceiling=255, is_matmul=False):
    return StaticCase(kernel=name, function=function, signature=signature, constexprs=constexprs,
                      num_warps=warps, num_stages=stages, targets=(90,), is_matmul=is_matmul,
                      max_registers={90: ceiling})

bf16 = {"x_ptr": "*bf16", "y_ptr": "*bf16"}
product = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32", "D": "i32:16"}
tile = {"M": 128, "N": 128, "K": 64}
cases = [
    case("good copy", copy, bf16 | {"stride": "i32:16"}, {"BLOCK": 1024}),
    case("good matmul", matmul, product, tile, warps=8, is_matmul=True),
    case("unaligned", copy, bf16 | {"stride": "i32"}, {"BLOCK": 1024}),
    case("ceiling", copy, bf16 | {"stride": "i32:16"}, {"BLOCK": 1024}, ceiling=8),
    case("spills", matmul, product, {"M": 128, "N": 256, "K": 64}, is_matmul=True),
    case("shared", matmul, product, {"M": 128, "N": 256, "K": 128}, warps=8, stages=3, is_matmul=True),
    case("no tensor core", copy, bf16 | {"stride": "i32:16"}, {"BLOCK": 1024}, is_matmul=True),
]
print(json.dumps({c.kernel: violations(c, compile_case(c, 90)) for c in cases}))
"""


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, list[dict]]:
    """Exit code, messages and rows of one report over every op."""
    path = tmp_path_factory.mktemp("static") / "rows.json"
    command = [
        "-m",
        "phimini.bench.offline.static_report",
        "--check",
        "--ours",
        "--json",
        str(path),
    ]
    ran = subprocess.run(
        [sys.executable, *command], env=ENVIRONMENT, capture_output=True, text=True, timeout=900
    )
    return ran.returncode, ran.stderr[-3000:], json.loads(path.read_text()) if path.exists() else []


def test_every_shipped_kernel_passes_the_gate(shipped: tuple[int, str, list[dict]]) -> None:
    code, messages, rows = shipped
    assert code == 0, messages
    assert all(list(row) == COLUMNS for row in rows)
    for kernel in {row["kernel"] for row in rows}:
        targets = {row["target"] for row in rows if row["kernel"] == kernel}
        assert targets == {"sm_80", "sm_90", "sm_100"}, f"{kernel} is compiled for {targets} alone"


def test_the_committed_table_is_what_is_compiled(shipped: tuple[int, str, list[dict]]) -> None:
    committed = (
        (Path(__file__).parents[3] / "bench" / "results" / "static.md").read_text().splitlines()
    )
    assert f"triton {triton.__version__}," in committed[0], (
        "make bench/results/static.md anew: another triton"
    )
    missing = [line for line in markdown_table(shipped[2]).splitlines() if line not in committed]
    assert not missing, "\n".join(["not in bench/results/static.md:", *missing])


def test_no_kernel_is_left_out() -> None:
    folder = Path(str(phimini.kernels.__file__)).parent
    modules = [
        importlib.import_module(f"phimini.kernels.{p.stem}") for p in folder.glob("[!.]*.py")
    ]
    shipped = {name for m in modules for name in vars(m) if name.endswith("_kernel")}
    reported = {case.function.__name__ for case in all_cases(peers=False)}
    assert shipped and shipped <= reported, f"not in any static_cases(): {shipped - reported}"


def test_planted_defects_break_the_gate(tmp_path: Path) -> None:
    script = tmp_path / "planted.py"
    script.write_text(PLANTED)
    ran = subprocess.run(
        [sys.executable, str(script)], env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout)
    assert found["good copy"] == [] and found["good matmul"] == []
    expected = {
        "unaligned": "global accesses of 16 bits",
        "ceiling": "the ceiling is 8",
        "spills": "spill instructions",
        "shared": "bytes of shared memory",
        "no tensor core": "tensor-core instruction None, expected HGMMA",
    }
    for name, text in expected.items():
        assert any(text in violation for violation in found[name]), f"{name}: {found[name]}"


def test_the_interpreter_and_the_compiler_do_not_mix() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "phimini.bench.offline.static_report", "swiglu"],
        env=ENVIRONMENT | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ran.returncode != 0
    assert "TRITON_INTERPRET=1 is set" in ran.stderr
