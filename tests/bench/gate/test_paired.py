"""The typical ratio of paired rounds: right where it is known, honest about its error, and enough rounds are taken for it."""

import math
import random
import statistics

import pytest

from phimini.bench.gate.paired_ratio import NARROW, RUN_TO_RUN, Rounds, is_narrow, student, typical


def test_the_estimate_is_hodges_and_lehmann_s_of_the_logarithm() -> None:
    samples = [1.0, 2.0, 16.0]
    # logs to base 2: 0, 1, 4; means of all pairs: 0, 0.5, 1, 2, 2.5, 4, whose median is 1.5
    got = typical(samples)
    assert got.mid == pytest.approx(2**1.5)
    # Wilcoxon's deviation of 3 rounds is sqrt(3.5): 1.87 places about place 2.5, from 0.63 to 4.37
    low, high = 0.5 * 0.6292, 2.5 + 1.5 * 0.3708
    half = (high - low) / 2 * math.log(2) * student(0.995, 2) + RUN_TO_RUN
    assert got.reach == pytest.approx(math.exp(half), rel=1e-3)
    assert got.low * got.high == pytest.approx(got.mid**2)


def test_equal_rounds_leave_what_runs_differ_by() -> None:
    assert typical([3.0] * 15).reach == pytest.approx(math.exp(RUN_TO_RUN))
    with pytest.raises(ValueError, match="at least 3 rounds, got 2"):
        typical([1.0, 1.0])


@pytest.mark.parametrize("freedom, table", [(3, 5.841), (4, 4.604), (7, 3.499), (14, 2.977), (60, 2.660)])  # fmt: skip
def test_student(freedom: int, table: float) -> None:
    assert student(0.995, freedom) == pytest.approx(table, rel=0.04)


def test_a_few_disturbed_rounds_move_nothing() -> None:
    generator = random.Random(0)
    calm = [math.exp(generator.gauss(0, 0.02)) for _ in range(40)]
    disturbed = [5.0 if i % 10 == 0 else value for i, value in enumerate(calm)]
    assert typical(disturbed).mid == pytest.approx(typical(calm).mid, rel=0.01)
    assert statistics.mean(disturbed) > 1.3 * statistics.mean(calm)


@pytest.mark.parametrize("rounds", [8, 15, 60])
def test_the_band_holds_the_truth_almost_always(rounds: int) -> None:
    """And without RUN_TO_RUN no more often than it says: 99 % of 2,000."""
    generator, inside = random.Random(rounds), 0
    for _ in range(2000):
        band = typical([math.exp(generator.gauss(0, 0.1)) for _ in range(rounds)])
        inside += abs(math.log(band.mid)) < math.log(band.reach) - RUN_TO_RUN
    assert 0.975 <= inside / 2000 <= 0.997


def test_rounds_go_on_until_the_ratio_is_known() -> None:
    generator, rounds = random.Random(1), Rounds(at_least=10, at_most=200)

    def taken(noise: float) -> int:
        ours: list[float] = []
        reference: list[float] = []
        while not rounds.enough(ours, reference, 0.0):
            ours.append(math.exp(generator.gauss(0, noise)))
            reference.append(math.exp(generator.gauss(0, noise)))
        assert is_narrow(ours, reference) or len(ours) == 200
        return len(ours)

    assert taken(0.001) == 10
    assert 15 < taken(0.03) < 100  # (2.6 * 1.41 * 0.03 / NARROW) ** 2 is 31
    assert taken(0.3) == 200
    assert (
        NARROW < 0.05 / 2
    )  # of two bands that just do not overlap, a limit of 5 % is wider than either


def test_time_ends_the_rounds_too() -> None:
    rounds, wild = Rounds(at_least=5, seconds=1.0), [1.0, 9.0] * 10
    assert not rounds.enough(wild[:4], wild[1:5], 2.0)
    assert not rounds.enough(wild[:5], wild[1:6], 0.5)
    assert rounds.enough(wild[:5], wild[1:6], 2.0)
