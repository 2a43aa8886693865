"""The counted step of the full-size model: committed rows, and the limits that they must keep."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COMMITTED = Path(__file__).parents[3] / "bench" / "results" / "step.jsonl"
SAME = ("kernels_per_layer", "head_small_kernels_per_chunk", "pinned_copies", "layer")
SMALL_KERNELS = {"midtrain": 27, "sft": 27, "rollout_dpo": 20, "rlvr": 49}


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    return {row["stage"]: row for row in map(json.loads, path.read_text().splitlines())}


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Counted in another process, where Triton does not interpret."""
    path = tmp_path_factory.mktemp("step") / "step.jsonl"
    ran = subprocess.run(
        [sys.executable, "-m", "phimini.bench.cli", "step", "--lengths", "2x8192", "--json", str(path)],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    return rows_of(path)


MODES = [(tensor, recompute) for tensor in (1, 2) for recompute in ("none", "selective", "full")]
TRACE_ALL = """
import sys
from phimini.bench.system.step import main
for tensor in "12":
    for recompute in ("none", "selective", "full"):
        main(["--lengths", "2x8192", "--tensor", tensor, "--recompute", recompute, "--json", f"{sys.argv[1]}/{tensor}{recompute}"])
"""


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the rows of every stage, of one and two tensor ranks, in every recompute mode."""
    folder = tmp_path_factory.mktemp("traced")
    ran = subprocess.run(
        [sys.executable, "-c", TRACE_ALL, str(folder)],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    return folder


@pytest.mark.parametrize("stage", SMALL_KERNELS)
@pytest.mark.parametrize(("tensor", "recompute"), MODES)
def test_the_plan_counts_what_a_traced_step_launches_and_holds(
    stage: str, tensor: int, recompute: str, traced: Path
) -> None:
    row = rows_of(traced / f"{tensor}{recompute}")[stage]
    assert row["planned_peak_bytes"] == pytest.approx(row["peak_bytes"], rel=0.03)
    for name, counted in row["counted"].items():
        tolerance = 0.02 if name == "bytes" else 1e-6
        assert row["planned"][name] == pytest.approx(counted, rel=tolerance), name
    assert row["planned_ms"] == pytest.approx(row["predicted_step_ms"], rel=0.01)


@pytest.mark.parametrize("stage", SMALL_KERNELS)
def test_a_step_is_as_committed_and_within_its_limits(
    stage: str, counted: dict[str, dict[str, Any]]
) -> None:
    row, committed = counted[stage], rows_of(COMMITTED)[stage]
    assert {name: row[name] for name in SAME} == {name: committed[name] for name in SAME}
    for name in ("other_bytes_per_layer", "peak_bytes", "predicted_step_ms"):
        assert row[name] == pytest.approx(committed[name], rel=0.01), name
    assert row["kernels_per_layer"] <= 30
    assert row["head_small_kernels_per_chunk"] <= SMALL_KERNELS[stage]
    assert row["pageable_copies"] == row["synchronisations"] == 0 and row["pinned_copies"] == 1
    assert row["peak_bytes"] <= 36.5 * 2**30
    assert row["planned_peak_bytes"] == pytest.approx(row["peak_bytes"], rel=0.03)
