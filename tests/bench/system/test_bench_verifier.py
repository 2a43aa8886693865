"""The bench of the verifier: every verdict of its answers is right, and its rows say how fast."""

import json
from pathlib import Path

import pytest

from phimini.bench.cli import main
from phimini.bench.system import verifier


def test_rows_of_both_kinds_of_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "verifier.jsonl"
    words = ["verifier", "--quick", "--workers", "1", "--rounds", "1", "--json", str(path)]
    assert main(words) == 0
    rows = [row for row in map(json.loads, path.read_text().splitlines()) if row["kind"] == "row"]
    assert [row["case"]["answers"] for row in rows] == ["integer", "symbolic"]
    assert all(row["correct"] and row["samples"][0] > 0 for row in rows)
    assert "WRONG" not in capsys.readouterr().out


def test_a_wrong_verdict_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = verifier.integers
    monkeypatch.setattr(
        verifier, "integers", lambda *size: [(item, 1.0 - score) for item, score in right(*size)]
    )
    assert main(["verifier", "--quick", "--workers", "1", "--rounds", "1"]) == 1
    assert "integer   WRONG" in capsys.readouterr().out
