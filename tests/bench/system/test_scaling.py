"""`phimini bench scaling`: its points, their yardsticks, and the check of the loss."""

import pytest
from forked_ranks import run_ranks

from phimini.bench.gate.rows import Row
from phimini.bench.system.scaling import (
    POINTS,
    ROUNDS,
    Point,
    measure_data,
    measure_steps,
)

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
    assert all(r.correct and r.value and r.ratio and len(r.samples) == ROUNDS for r in rows)
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
