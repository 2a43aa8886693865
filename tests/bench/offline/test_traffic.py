"""Bytes requested over the minimum, ours and Liger's side by side."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from phimini.bench.offline.traffic import TorchTraffic

# Largest ratio of ours; the peers' are only reported.
GATES = {
    "rms_norm_fwd": 1.10,
    "rms_norm_add_fwd": 1.10,
    "rms_norm_bwd": 1.10,
    "rope_fwd": 1.01,
    "rope_bwd": 1.01,
    "swiglu_fwd": 1.0,
    "swiglu_bwd": 1.0,
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict]:
    """Counted in another process: here torch.empty writes NaN, which would count."""
    path = tmp_path_factory.mktemp("traffic") / "rows.json"
    ran = subprocess.run(
        [sys.executable, "-m", "phimini.bench.ops.kernels", "rms_norm", "rope", "swiglu"]
        + ["--traffic", "--json", str(path)],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(path.read_text())
    columns = ["kernel", "provider", "requested_bytes", "minimum_bytes", "ratio"]
    assert all(list(row) == columns for row in found)
    return {(row["kernel"], row["provider"]): row for row in found}


@pytest.mark.parametrize("kernel", GATES)
def test_ours_stays_near_the_minimum(kernel: str, rows: dict[tuple[str, str], dict]) -> None:
    row = rows[kernel, "phimini"]
    assert 1.0 <= row["ratio"] <= GATES[kernel], row


def test_a_weight_read_again_for_every_row_is_seen(rows: dict[tuple[str, str], dict]) -> None:
    pytest.importorskip("liger_kernel")
    assert 1.4 < rows["rms_norm_fwd", "liger"]["ratio"] < 1.55


def test_the_interpreter_is_required() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-m", "phimini.bench.offline.traffic", "swiglu"],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ran.returncode != 0 and "set TRITON_INTERPRET=1" in ran.stderr


def counted(fn, *args) -> int:
    with TorchTraffic() as traffic:
        fn(*args)
    return traffic.num_bytes


def test_torch_operations_are_counted_by_their_operands() -> None:
    a, b = torch.randn(8, 16), torch.randn(16, 4)  # 512 and 256 bytes
    assert counted(torch.mm, a, b) == 512 + 256 + 128
    assert counted(torch.add, a, a) == 2 * 512
    assert counted(torch.Tensor.add_, a, a.clone()) == 3 * 512
    assert counted(torch.Tensor.zero_, a) == 512
    assert counted(lambda: a.t()[3:5]) == 0
    assert counted(torch.Tensor.sum, torch.randn(1, 16).expand(8, 16)) == 64 + 4
    assert counted(torch.index_select, a, 0, torch.tensor([1, 2])) == 2 * 128 + 16


def test_what_a_custom_op_does_inside_is_counted() -> None:
    @torch.library.custom_op("phimini_test::double", mutates_args=())
    def double(x: Tensor) -> Tensor:
        return x.reshape(-1).contiguous() * 2

    x = torch.randn(8, 16, requires_grad=True)
    assert counted(double, x) == 2 * 512
    assert counted(double, x.t()) == 4 * 512  # the copy that makes it contiguous
