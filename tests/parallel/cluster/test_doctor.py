"""The preflight checks pass on healthy ranks, and name the rank that is not, within their deadline."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_ranks import run_ranks

from phimini.parallel.cluster import preflight as doctor
from phimini.parallel.cluster.preflight import CheckFailed, check_ranks, examine_ranks
from phimini.parallel.ranks.layout import Layout


def examine(
    world_size: int,
    sabotage: Callable[[], None] | None = None,
    bad: int = 1,
    deadline_s: float = 30.0,
) -> list[Any]:
    """Return each rank's findings, or the CheckFailed it raises, after `sabotage` of rank `bad`."""

    def run() -> Any:
        if sabotage is not None and os.environ["RANK"] == str(bad):
            sabotage()
        try:
            return check_ranks(deadline_s=deadline_s)
        except CheckFailed as failure:
            return f"failed: {failure}"

    return run_ranks(run, world_size)


def test_well_ranks_at_a_layout(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_ranks(examine_ranks, 4, Layout(tensor=2, pipeline=2)) == [0] * 4
    said = capfd.readouterr().out
    assert "doctor: 4 ranks on 1 nodes" in said and f"torch {torch.__version__}" in said
    assert "attention torch's flash kernel for CPUs" in said
    assert "4 of 4 agree on a seeded GEMM" in said
    assert "all-reduce job: 1 groups of 4" in said
    assert "all-reduce tensor: 2 groups of 2" in said and "all-reduce pipeline: 2 groups" in said
    assert "all-reduce data" not in said, "groups of one rank have nothing to say"
    assert "doctor: ok, " in said and "BAD" not in said


def test_the_run_s_folder_is_one_file_system(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_ranks(check_ranks, 2, None, tmp_path / "new") == [[], []]
    assert f"{tmp_path / 'new'}: seen by 2 of 2 ranks" in capfd.readouterr().out
    assert not list((tmp_path / "new").iterdir())

    for rank in "01":
        (tmp_path / rank).mkdir()

    def on_a_disk_of_its_own() -> list[str]:
        return check_ranks(None, tmp_path / os.environ["RANK"])

    (found, same) = run_ranks(on_a_disk_of_its_own, 2)
    assert found == same and len(found) == 1
    assert "expected one file system for all ranks; rank 1" in found[0]
    (tmp_path / "file").touch()
    assert (
        "rank 0 cannot write there: NotADirectoryError"
        in check_ranks(None, tmp_path / "file" / "x")[0]
    )


def test_one_rank_without_torchrun(capsys: pytest.CaptureFixture[str]) -> None:
    assert examine_ranks(None) == 0
    assert "1 of 1 agree" in capsys.readouterr().out


def other_version() -> None:
    facts = doctor._facts
    doctor._facts = lambda device: facts(device) | {"versions": {"torch": "1.0"}}


def other_environment() -> None:
    os.environ["NCCL_ALGO"] = "Ring"


def wrong_gemm() -> None:
    randn = torch.randn
    torch.randn = lambda *a, **k: randn(*a, **k) * (1 + 1e-7)


def flaky_gemm() -> None:
    calls: list[int] = []
    real = torch.Tensor.__matmul__

    def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return real(a, b) + (1e-4 if len(calls) == 2 else 0)

    torch.Tensor.__matmul__ = matmul  # pyright: ignore[reportAttributeAccessIssue]


def wrong_sum() -> None:
    doctor.dist.all_reduce = lambda values, *, group, async_op, f=doctor.dist.all_reduce: f(
        values.add_(1), group=group, async_op=async_op
    )


@pytest.mark.parametrize(
    ("sabotage", "message"),
    [
        (other_version, "torch is 1.0, the others have "),
        (other_environment, "NCCL_ALGO is Ring, the others have None"),
        (wrong_gemm, "the other devices of its kind have"),
        (flaky_gemm, "the same GEMM gave"),
    ],
    ids=lambda v: v.__name__ if callable(v) else "",
)
def test_the_rank_that_differs_is_named(sabotage: Callable[[], None], message: str) -> None:
    of_ranks = examine(3, sabotage)
    assert of_ranks[0] == of_ranks[1] == of_ranks[2], "every rank ends with the same status"
    assert of_ranks[0], "something was found"
    found = [f for f in of_ranks[0] if message in f]
    assert found and all(f.startswith("rank 1 (") for f in of_ranks[0])


def test_a_wrong_sum_names_the_group() -> None:
    of_ranks = examine(2, wrong_sum)
    assert of_ranks[0] == of_ranks[1]
    assert [f.startswith(f"rank {r} (") for r, f in enumerate(of_ranks[0])] == [True, True]
    assert all(f.endswith(": wrong sum in the job all-reduce") for f in of_ranks[0])


@pytest.mark.parametrize("where", ["_facts", "_gemm", "_all_reduce"])
def test_a_rank_that_does_not_answer_is_named_in_time(where: str, tmp_path: Path) -> None:
    deadline_s = 5.0

    def stall(*_: Any) -> None:
        while len(list(tmp_path.iterdir())) < 2:  # until the others have given up
            time.sleep(0.05)

    def run() -> tuple[str, float]:
        if os.environ["RANK"] == "2":
            setattr(doctor, where, stall)
        started = time.monotonic()
        with pytest.raises(CheckFailed) as e:
            check_ranks(deadline_s=deadline_s)
        (tmp_path / os.environ["RANK"]).touch()
        return str(e.value), time.monotonic() - started

    check = {"_facts": "facts", "_gemm": "device", "_all_reduce": "all-reduce job"}[where]
    (first, took_s), (second, _), _ = run_ranks(run, 3, timeout_s=60)
    assert first == second and took_s < 2 * deadline_s
    assert first.startswith(f"{check}: no answer from rank 2") and first.endswith("the deadline")


def test_groups_of_nodes_and_axes() -> None:
    hosts = ["a"] * 4 + ["b"] * 4
    kinds = doctor._groups(hosts, Layout(tensor=2, context=2))
    assert kinds == {
        "job": [list(range(8))],
        "node": [[0, 1, 2, 3], [4, 5, 6, 7]],
        "across nodes": [[0, 4], [1, 5], [2, 6], [3, 7]],
        "tensor": [[0, 1], [2, 3], [4, 5], [6, 7]],
        "context": [[0, 2], [1, 3], [4, 6], [5, 7]],
        "data": [[0, 4], [1, 5], [2, 6], [3, 7]],
    }


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="1 ranks do not divide into the layout's 2"):
        examine_ranks(Layout(tensor=2))
