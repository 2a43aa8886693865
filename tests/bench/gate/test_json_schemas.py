"""Fields that `--json PATH` of every verb writes for users' CI; PATH.jsonl of a bench is for `bench compare`."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from peers_cases import fakes

from phimini.bench.cli import main
from phimini.bench.gate.paired_ratio import Rounds
from phimini.bench.gate.rows import Row, read
from phimini.bench.offline import static_report
from phimini.bench.offline import traffic as traffic_module
from phimini.bench.ops import kernels
from phimini.bench.ops.harness import Timing
from phimini.bench.peers import command as peers
from phimini.bench.system import rollout, weight_sync
from phimini.stages.cli import main as phimini

SCHEMAS = {
    "static": "kernel provider target config registers spills shared_bytes mma global_access_bits occupancy",
    "traffic": "kernel provider requested_bytes minimum_bytes ratio",
    "kernels": "op provider pass shape dtype device ms_p20 ms_p50 ms_p80 cpu_seconds peak_extra_bytes max_relative_error "
               "percent_of_peak",
    "weight-sync": "transport layout parameters bytes gather_s pack_s transfer_s load_s verify_s total_s peak_extra_bytes",
    "rollout": "engine batch prompt_tokens new_tokens tokens_per_second tokens_per_cpu_second max_abs_dlogp",
    "peers": "task provider unit per_cpu_second peak_rss_bytes first_loss versions ratio",
}  # fmt: skip


def fields(verb: str) -> list[str]:
    return SCHEMAS[verb].split()


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows = json.loads(path.read_text())
    assert isinstance(rows, list) and rows
    return rows


@pytest.mark.parametrize("suffix", ["json", "txt"])
def test_timed_kernels(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "QUICK", Timing(rounds=Rounds(at_least=3, at_most=3)))
    path = tmp_path / f"rows.{suffix}"
    assert main(["kernels", "swiglu", "--quick", "--json", str(path)]) == 0
    assert all(list(row) == fields("kernels") for row in rows_of(path))


def test_timed_kernels_for_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "QUICK", Timing(rounds=Rounds(at_least=3, at_most=3)))
    path = tmp_path / "rows.jsonl"
    assert main(["kernels", "swiglu", "--quick", "--json", str(path)]) == 0
    assert all(row.bench == "kernels" and len(row.samples) == 3 for row in read(path))


def test_static_and_traffic() -> None:
    """Both commands write `asdict` of these; tests/bench/offline/test_static_report.py and test_traffic.py run them."""
    for verb, row in (("static", static_report.StaticRow), ("traffic", traffic_module.TrafficRow)):
        assert [f.name for f in dataclasses.fields(row)] == fields(verb)


SYNC: dict[str, Any] = dict.fromkeys(weight_sync.PHASES, 0.5) | dict.fromkeys(weight_sync.SHARES, 0.1) | {
    "model": "tiny", "transport": "shm", "layout": "tp1", "parameters": 3, "bytes": 12, "peak_extra_bytes": 5,
    "bucket_bytes": 8, "total_ms": [1.0] * 5, "copy_ms": [1.0] * 5, "device": "cpu", "torch": "x",
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_weight_sync_and_rollout(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their measuring is replaced; tests marked vllm run it."""
    for module in (weight_sync, rollout):
        monkeypatch.setattr(module, "require_vllm", lambda: None)
    monkeypatch.setattr(weight_sync, "bench", lambda *_: [SYNC])
    case: dict[str, Any] = {"batch": 1, "prompt_tokens": 2, "new_tokens": 3}
    rates = {"tokens_per_second": 1.0, "tokens_per_cpu_second": 2.0}
    row = Row(
        bench="rollout",
        case=case,
        provider="vllm",
        unit="tokens/cpu_s",
        samples=[1.0] * 5,
        error=1e-6,
        info=rates,
    )
    monkeypatch.setattr(rollout, "run_ranks", lambda *_: [[row]])
    for verb in ("weight-sync", "rollout"):
        path = tmp_path / f"{verb}.{suffix}"
        assert main([verb, "--quick", "--json", str(path)]) == 0
        if suffix == "json":
            assert all(list(row) == fields(verb) for row in rows_of(path))
        else:
            assert [row.bench for row in read(path)] == [verb]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_peers(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes(monkeypatch, (0.5, 30.0), (0.50005, 10.0))
    monkeypatch.setattr(
        peers, "prepare", lambda folder: peers.override(peers.tiny(), [f"out={folder / 'run'}"])
    )
    path = tmp_path / f"rows.{suffix}"
    words = ["sft", "dpo", "--rounds", "3", "--python", sys.executable, "--json", str(path)]
    assert main(["peers", *words]) == 0
    text = path.read_text()
    rows = rows_of(path) if suffix == "json" else [json.loads(line) for line in text.splitlines()]
    assert [(r["task"], r["provider"]) for r in rows] == [(t, p) for t in ("sft", "dpo") for p in ("phimini", "trl")]  # fmt: skip
    for row in rows:
        assert list(row) == fields("peers")
        assert (row["ratio"] is not None) == (row["provider"] == "phimini")


def test_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    words = ["plan", "phi4_mini_reasoning", "stage=sft", "gpu=h100", "gpus=8", "--json", str(path)]
    assert phimini(words) in (0, 1)
    plan = json.loads(path.read_text())
    assert {"fits", "layouts", "assumptions"} <= plan.keys() and isinstance(plan["fits"], bool)
    layout = {
        "layout",
        "memory_bytes",
        "peak_bytes",
        "flops_per_token",
        "predicted_tokens_per_second_per_gpu",
    }
    assert plan["layouts"] and all(layout <= one.keys() for one in plan["layouts"])


def test_the_help_says_which_rows_a_path_gets(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("kernels", "rollout", "weight-sync", "peers"):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        assert ".jsonl" in capsys.readouterr().out, verb
