"""The host's work of an RL step and of the probe: committed rows, and a small run within their limits."""

import json
from pathlib import Path
from typing import Any

import pytest

from phimini.bench.cli import main

COMMITTED = Path(__file__).parents[3] / "bench" / "results" / "rl_host.jsonl"
FIELDS = "rollouts tokens data_ranks part cpu_seconds_per_rank held_bytes_per_token peak_rss_bytes engine judges"  # fmt: skip
PARTS = ["sample", "choose", "log", "deliver", "pack", "step"]
WHOLE = {"rollouts": 1024, "tokens": 12_288, "data_ranks": 8}
HELD_BYTES, PEAK_BYTES = 9.0, 2e9
CPU_S = {"colocated": 1.0, "served": 1.5}
"""of the busiest rank in a step of WHOLE; with a served engine rank 0 has all answers and feeds the judges"""


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_committed_step_and_probe_are_within_their_limits() -> None:
    rows = rows_of(COMMITTED)
    assert [row["part"] for row in rows] == [*PARTS, *PARTS, "probe"]
    assert all(list(row) == FIELDS.split() for row in rows)
    for row in rows:
        if row["part"] == "probe":
            assert row["rollouts"] == 80_000 and row["tokens"] == WHOLE["tokens"]
        else:
            assert {name: row[name] for name in WHOLE} == WHOLE
            assert row["held_bytes_per_token"] <= HELD_BYTES
        if row["part"] == "step":
            assert row["cpu_seconds_per_rank"] <= CPU_S[row["engine"]]
        if row["peak_rss_bytes"] is not None:
            assert row["peak_rss_bytes"] < PEAK_BYTES


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A sixteenth of the step's rollouts on two ranks, so that a rank's share is a quarter of the whole one's."""
    path = tmp_path_factory.mktemp("rl-host") / "rows.jsonl"
    words = "--rollouts 64 --probed 64 --tokens 12288 --data-ranks 2 --judges 1".split()
    assert main(["rl-host", *words, "--json", str(path)]) == 0
    return rows_of(path)


def test_a_small_step_costs_no_more(small: list[dict[str, Any]]) -> None:
    assert [row["part"] for row in small] == [*PARTS, *PARTS, "probe"]
    for row in small:
        assert list(row) == FIELDS.split()
        if row["part"] == "step":
            # Half, not a quarter: a part does not shrink, and the machine may be busy.
            assert 0 < row["cpu_seconds_per_rank"] <= CPU_S[row["engine"]] / 2
        if row["part"] != "probe":
            assert 0 < row["held_bytes_per_token"] <= HELD_BYTES, row
        if row["part"] in ("sample", "log", "choose"):
            assert row["held_bytes_per_token"] > 8.0, "4 bytes of token, 4 of log-prob"
        if row["peak_rss_bytes"] is not None:
            assert row["peak_rss_bytes"] < PEAK_BYTES
