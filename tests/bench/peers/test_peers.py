"""The comparison with TRL: what each side says, how turns become rows, and that other losses stop it. TRL itself: opt-in."""

import json
import os
import sys
from pathlib import Path

import pytest
from peers_cases import fakes

from phimini.bench.cli import main
from phimini.bench.peers import command as peers
from phimini.model.io.json_files import read_rows


def test_turns_become_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes(monkeypatch, (0.5, 30.0), (0.50005, 10.0))
    run = peers.override(peers.tiny(), ["out=x/run"])
    ours, trl = peers.compare("sft", run, Path(sys.executable), rounds=3, steps=1)
    assert set(ours) == {"task", "provider", "unit", "per_cpu_second", "peak_rss_bytes", "first_loss", "versions", "ratio"}  # fmt: skip
    assert (ours["provider"], ours["per_cpu_second"], ours["ratio"]) == (
        "phimini",
        30.0,
        pytest.approx(3.0),
    )
    assert (trl["provider"], trl["unit"], trl["ratio"]) == ("trl", "tokens", None)
    assert "3.00 times (target 1.8)" in peers.describe([ours, trl])


def test_other_losses_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes(monkeypatch, (0.5, 30.0), (0.5002, 10.0))
    run = peers.override(peers.tiny(), ["out=x/run"])
    with pytest.raises(RuntimeError, match="the same batch has other losses"):
        peers.compare("sft", run, Path(sys.executable), rounds=1, steps=1)


def test_a_side_that_ends_is_named_with_its_last_words() -> None:
    side = peers.Side("trl", [sys.executable, "-c", "raise SystemExit('no TRL here')"])
    with pytest.raises(RuntimeError, match="(?s)trl ended:.*no TRL here"):
        side.hear()


def test_without_an_environment_the_make_target_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["peers", "--python", str(tmp_path / "python")]) == 2
    assert "`make bench-peers` sets it up" in capsys.readouterr().err


def test_the_committed_rows_meet_the_targets() -> None:
    root = Path(__file__).parents[3]
    rows = read_rows(root / "bench" / "results" / "peers.jsonl", {"task": str})
    ratios = {r["task"]: r["ratio"] for r in rows if r["provider"] == "phimini"}
    assert ratios.keys() == peers.TARGETS.keys()
    assert all(ratios[task] >= target for task, target in peers.TARGETS.items())


@pytest.mark.optin
@pytest.mark.skipif(not peers.PYTHON.exists(), reason="needs TRL's environment: make bench-peers")
@pytest.mark.skipif(
    "PHIMINI_BENCH_PEERS" not in os.environ, reason="takes minutes: PHIMINI_BENCH_PEERS=1"
)
def test_targets_against_trl(tmp_path: Path) -> None:
    """Minutes, and needs `make bench-peers`' environment: run by name."""
    file = tmp_path / "rows.jsonl"
    assert peers.main(["--rounds", "3", "--steps", "2", "--json", str(file)]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for ours, trl in zip(rows[::2], rows[1::2], strict=True):
        assert ours["ratio"] >= peers.TARGETS[ours["task"]]
        assert ours["peak_rss_bytes"] < trl["peak_rss_bytes"]
