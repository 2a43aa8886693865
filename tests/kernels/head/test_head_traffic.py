"""Bytes that the head asks for: its row pass near one read and one write, the whole op far below Liger's."""

import json
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def ratios(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], float]:
    """Counted in another process: here torch.empty writes NaN, which would count."""
    path = tmp_path_factory.mktemp("traffic") / "rows.json"
    command = [
        "-m",
        "phimini.bench.ops.kernels",
        "linear_cross_entropy",
        "--traffic",
        "--json",
        str(path),
    ]
    ran = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return {(row["kernel"], row["provider"]): row["ratio"] for row in json.loads(path.read_text())}


def test_row_pass_reads_the_logits_once(ratios: dict[tuple[str, str], float]) -> None:
    assert 1.0 < ratios["cross_entropy_row_pass", "phimini"] <= 1.02


def test_a_second_read_is_seen(ratios: dict[tuple[str, str], float]) -> None:
    pytest.importorskip("liger_kernel")
    assert 1.45 < ratios["cross_entropy_row_pass", "liger"] < 1.55


def test_whole_head_moves_a_fifth_of_ligers_bytes(ratios: dict[tuple[str, str], float]) -> None:
    """At Phi-4-Mini's V / D = 65, where Liger's chunks have 1/65 of the rows. Liger takes its GPU path, whose dW is added to
    in place; on its CPU path, with a copy of dW in fp32 for every chunk, it would be a twelfth."""
    pytest.importorskip("liger_kernel")
    op = "linear_cross_entropy"
    assert 4.5 < ratios[op, "liger"] / ratios[op, "phimini"] < 5.5
