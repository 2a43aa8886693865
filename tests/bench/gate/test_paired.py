"""The typical ratio of paired rounds: known values, the coverage of its band, and the number of rounds."""

import math
import random
import statistics

import pytest

from phimini.bench.gate.paired_ratio import NARROW, RUN_TO_RUN, Rounds, is_narrow, typical


def test_the_estimate_is_the_trimmed_mean_of_the_logarithm() -> None:
    # logs to base 2: 0, 1, 2, 3, 14; without the outer fifths 1, 2, 3, whose mean is 2
    got = typical([1.0, 2.0, 4.0, 8.0, 2.0**14])
    assert got.mid == pytest.approx(4.0)
    # Winsorised: 1, 1, 2, 3, 3, whose deviation is 1. Tukey and McLaughlin: its error is 1 / (0.6 sqrt(5)), and Student's
    # t has 2 degrees of freedom: 9.925 at 99.5 %
    half = 9.925 / (0.6 * math.sqrt(5)) * math.log(2) + RUN_TO_RUN
    assert got.reach == pytest.approx(math.exp(half), rel=1e-3)
    assert got.low * got.high == pytest.approx(got.mid**2)


def test_equal_rounds_leave_what_runs_differ_by() -> None:
    assert typical([3.0] * 15).reach == pytest.approx(math.exp(RUN_TO_RUN))
    with pytest.raises(ValueError, match="at least 3 rounds, got 2"):
        typical([1.0, 1.0])


def test_a_few_disturbed_rounds_move_nothing() -> None:
    generator = random.Random(0)
    calm = [math.exp(generator.gauss(0, 0.02)) for _ in range(40)]
    disturbed = [5.0 if i % 10 == 0 else value for i, value in enumerate(calm)]
    assert typical(disturbed).mid == pytest.approx(typical(calm).mid, rel=0.01)
    assert statistics.mean(disturbed) > 1.3 * statistics.mean(calm)


@pytest.mark.parametrize("rounds", [8, 15, 60])
def test_the_band_holds_the_truth_almost_always(rounds: int) -> None:
    """Without RUN_TO_RUN in 99 % of 2,000 runs, as often as it says."""
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
