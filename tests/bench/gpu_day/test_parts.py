"""The GPU day's parts: every test that needs a GPU is in them, and the whole day rehearsed on a CPU."""

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from phimini.bench.gpu_day.parts import GPU_TESTS, ON_ANY_DEVICE, PARTS

ROOT = Path(__file__).parents[3]


def functions_of(file: Path) -> dict[str, list[str]]:
    """Return the decorators of each function of a test file."""
    return {
        node.name: [ast.unparse(d) for d in node.decorator_list]
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }


def test_every_gpu_test_is_in_the_day_and_every_entry_exists() -> None:
    marked = {
        f"{file.relative_to(ROOT)}::{name}"
        for file in (ROOT / "tests").rglob("test_*.py")
        for name, decorators in functions_of(file).items()
        if any(d.startswith("pytest.mark.gpu") for d in decorators)
    }
    assert set(GPU_TESTS) == marked and marked
    for name in GPU_TESTS.values():
        file, _, test = name.partition("::")
        assert test.partition("[")[0] in functions_of(ROOT / file), name


def test_no_part_forks_ranks_from_the_process_that_has_started_cuda() -> None:
    """`run_ranks` refuses once a test before it has used the GPU."""
    for file in ON_ANY_DEVICE:
        assert "run_ranks" not in (ROOT / file).read_text(), file


REHEARSE = """
import dataclasses, sys
from phimini.bench.gpu_day import command, parts
from phimini.stages import cli
fails = dataclasses.replace(parts.PARTS[0], name="fails", rehearsal=("-c", "raise SystemExit(7)"), share=5)
hangs = dataclasses.replace(parts.PARTS[0], name="hangs", rehearsal=("-c", "import time; time.sleep(900)"), share=5)
command.PARTS = (fails, parts.PARTS[0], hangs, *parts.PARTS[1:])
sys.exit(cli.main(["gpu-day", f"minutes={sys.argv[1]}", f"out={sys.argv[2]}"]))
"""


def test_the_day_is_rehearsed_on_a_cpu(tmp_path: Path) -> None:
    """Every part runs in its form for a CPU; one that fails and one that hangs stop no other."""
    minutes, started = 30, time.monotonic()
    ran = subprocess.run(
        [sys.executable, "-c", REHEARSE, str(minutes), str(tmp_path)], capture_output=True, text=True, timeout=60 * minutes + 120,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    )  # fmt: skip
    assert ran.returncode == 1, ran.stderr
    assert time.monotonic() - started < 60 * minutes
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows[0]["kind"] == "day" and rows[-1]["kind"] == "summary"
    assert all(row["mode"].startswith("rehearsal on a CPU") and row["torch"] for row in rows)
    status = {row["part"]: row["status"] for row in rows if row["kind"] == "end"}
    said = {row["part"]: row.get("said") for row in rows if row["kind"] == "end"}
    expected = {p.name: "ok" if p.rehearsal else "not rehearsed" for p in PARTS}
    assert status == expected | {"fails": "failed", "hangs": "timed out"}, said
    written = {row["part"]: row["row"] for row in rows if row["kind"] == "row"}
    for name in ("tests", "kernels", "step", "fp8", "recipe", "vllm-sync", "vllm-mismatch"):
        assert written[name], f"{name} wrote no row"
    steps = [row["row"]["stage"] for row in rows if row["kind"] == "row" and row["part"] == "step"]
    assert steps == ["midtrain", "sft", "rollout_dpo", "rlvr"]
    assert written["fp8"]["fp8"] == "tensorwise"
    table = ran.stdout.split("\n\n")[-1]
    assert all(f"\n{name} " in table for name in status)
