"""`phimini bench scaling`: its points are what they say, its plan keeps its own rules."""

import csv
import math
from pathlib import Path

import pytest

from phimini.bench.gate.rows import Row
from phimini.bench.system.scaling import (
    POINTS,
    ROUNDS,
    Point,
    measure_data,
    measure_steps,
    write_csv,
)
from phimini.bench.system.scaling_gpus import COLUMNS, COUNTS, write_gpus
from phimini.parallel.ranks.local_launch import run_ranks

SMALL = [
    Point("batch", 1, (64,)),
    Point("batch", 4, (64,) * 4),
    Point("vocabulary", 1024, (64,), 1024),
]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [*run_ranks(measure_steps, 1, SMALL)[0], *measure_data([50, 100])]


def test_every_point_is_right_and_held_to_a_yardstick(rows: list[Row]) -> None:
    assert [(r.case["axis"], r.case["x"]) for r in rows] == [
        ("batch", 1), ("batch", 4), ("vocabulary", 1024), ("data_size", 50), ("data_size", 100),
    ]  # fmt: skip
    assert all(r.correct and r.value and r.ratio and r.num_samples == ROUNDS for r in rows)
    assert len({r.key for r in rows}) == len(rows)
    one, four, wide, *_ = rows
    assert one.peak_bytes and four.peak_bytes and wide.peak_bytes
    # Activations grow with the tokens; chunked logits keep the head's from growing with the vocabulary alone.
    assert 3 < four.peak_bytes / one.peak_bytes <= 4.2
    assert one.peak_bytes < wide.peak_bytes < 3 * one.peak_bytes
    assert four.info["flops"] == 4 * one.info["flops"]


def test_the_points_cover_what_is_promised() -> None:
    xs = {axis: [p.x for p in POINTS if p.axis == axis] for axis in {p.axis for p in POINTS}}
    assert (xs["sequence_length"][0], xs["sequence_length"][-1]) == (256, 8192)
    assert {sum(p.lengths) for p in POINTS if p.axis == "documents_per_pack"} == {4096}
    assert all(p.vocabulary == p.x for p in POINTS if p.axis == "vocabulary")


def test_a_wrong_loss_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phimini.bench.system.scaling.LOSS_LIMIT", 1e-9)
    (row,) = run_ranks(measure_steps, 1, SMALL[:1])[0]
    assert not row.correct and row.value is None


def test_the_csv_holds_every_row(rows: list[Row], tmp_path: Path) -> None:
    write_csv(tmp_path / "scaling.csv", rows)
    with (tmp_path / "scaling.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(r["axis"], int(r["x"])) for r in table] == [(r.case["axis"], r.case["x"]) for r in rows]  # fmt: skip
    values = [row.value.p50 for row in rows if row.value is not None]
    assert [float(r["p50"]) for r in table] == pytest.approx(values, rel=1e-5)


def test_the_plan_from_8_to_1024_gpus(tmp_path: Path) -> None:
    write_gpus(tmp_path)
    with (tmp_path / "gpus.csv").open() as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == COLUMNS
    for stage in ("midtrain", "sft", "rollout_dpo", "rlvr"):
        own = [r for r in table if r["stage"] == stage and r["batch"] == "recipe"]
        assert [int(r["gpus"]) for r in own] == list(COUNTS)
        fitting = [r for r in own if r["fits"] == "True"]
        speeds = [float(r["planned_tokens_per_second"]) / int(r["gpus"]) for r in fitting]
        assert len(fitting) >= 6 and max(float(r["peak_gib"]) for r in fitting) <= 0.95 * 79.1 + 0.1
        # No layout is faster than 45 % of the peak, and no table is better than its overhead says.
        for row, speed in zip(fitting, speeds, strict=True):
            seconds = int(row["tokens_per_step"]) / float(row["planned_tokens_per_second"])
            assert math.isclose(seconds, float(row["planned_seconds_per_step"]), rel_tol=0.05)
            assert float(row["overhead"]) >= 1 and speed <= 0.45 * 989e12 / 23e9
    text = (tmp_path / "gpus.md").read_text()
    assert "planned and not measured" in text and "45 % is a goal" in text
