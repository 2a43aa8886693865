"""`phimini bench all` in its shortest form: every row is there, right and comparable. No time is asserted."""

import dataclasses
import os
import re
import sys
from pathlib import Path

import pytest
from gate_cases import CPU, row
from vllm_process import find_metadata

from phimini.bench.cli import BENCHES
from phimini.bench.gate import run_all as bench_all
from phimini.bench.gate.compare import compare
from phimini.bench.gate.rows import read
from phimini.bench.gate.run_all import PARTS, Part, problems_of


def test_every_part_is_a_bench() -> None:
    assert {(part.command or (name,))[0] for name, part in PARTS.items()} <= set(BENCHES)


def test_the_shortest_form_writes_every_row(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    path = tmp_path / "rows.jsonl"
    status = bench_all.main(
        ["--shortest", "--only", "kernels,static,traffic,data,train", "--json", str(path)]
    )
    out = capfd.readouterr().out
    assert status == 0, out
    ours = [r for r in read(path) if r.provider == "phimini"]
    assert {(r.bench, r.case.get("pass") or r.case.get("work") or r.case.get("stage")) for r in ours} == {
        ("kernels", "fwd"), ("kernels", "bwd"), ("data", "read"), ("data", "tokenize"), ("data", "pack"), ("data", "verify"),
        ("train", "midtrain"),
    }  # fmt: skip
    for r in ours:
        assert r.correct and r.value is not None and r.value.p50 > 0, r.key
        assert r.reference is not None and r.ratio is not None, r.key
        assert r.environment is not None and r.environment.threads == 1
    assert compare(read(path), read(path)).status == 0
    for part in ("kernels", "static", "traffic", "data", "train"):
        assert re.search(rf"^{part} +ok ", out, re.MULTILINE), out
    assert (
        "swiglu_fwd" in out and "sm_100" in out and "requested" in out
    )  # what static and traffic print


@pytest.mark.vllm
def test_the_rollout_bench_writes_every_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_metadata()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    path = tmp_path / "rows.jsonl"
    assert bench_all.main(["--shortest", "--only", "rollout", "--json", str(path)]) == 0
    rows = {r.provider: r for r in read(path)}
    assert rows.keys() == {"phimini", "vllm", "vllm-served"}
    assert rows["phimini"].reference == "vllm" and rows["phimini"].ratio is not None
    assert all(r.error is not None and r.error < 1e-4 for r in rows.values())


def test_a_row_that_is_wrong_or_not_comparable_is_a_problem() -> None:
    right = row(environment=CPU)
    assert problems_of("x", [right]) == []
    assert problems_of("x", []) == ["x: no row of ours was written"]
    peers = dataclasses.replace(right, provider="eager", reference=None, reference_samples=[])
    assert problems_of("x", [peers]) == ["x: no row of ours was written"]
    wrong = row(environment=CPU, correct=False, samples=[], reference_samples=[])
    assert problems_of("x", [wrong])[0].startswith("wrong: kernels:op=rope")
    few = row(environment=CPU, samples=[1.0] * 3, reference_samples=[1.0] * 3)
    assert problems_of("x", [few])[0].startswith("too few rounds: kernels:op=rope")


def test_a_part_that_fails_is_a_failure_and_the_others_still_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    parts = {"kernels": Part(shortest=("no_such_op",)), "nothing": Part(needs="no_such_module"), "nowhere": Part(needs="no/such/file", how="make it"),
             "compare": Part(shortest=("--help",), rows=False)}  # fmt: skip
    monkeypatch.setattr(bench_all, "PARTS", parts)
    path = tmp_path / "rows.jsonl"
    assert bench_all.main(["--shortest", "--json", str(path)]) == 1
    out = capfd.readouterr().out
    assert "kernels: ended with status " in out and "kernels: no row of ours was written" in out
    assert "nothing      LEFT OUT: needs no_such_module (pip" in out
    assert "nowhere      LEFT OUT: needs no/such/file (make it)" in out
    assert "compare      ok" in out
