"""Intervals and tests, checked against independent formulas or by their coverage."""

from itertools import combinations, product
from math import sqrt

import numpy as np
import pytest

from phimini.stages.report.intervals import (
    mcnemar,
    mean_interval,
    paired_gain,
    pass_at_k,
    wilson_interval,
)


@pytest.mark.parametrize(("correct", "trials"), [(1, 10), (5, 10), (81, 263), (503, 504)], ids=str)
def test_wilson_bounds_are_where_the_score_test_just_rejects(correct: int, trials: int) -> None:
    for bound in wilson_interval(correct, trials):
        z = abs(correct / trials - bound) / sqrt(bound * (1 - bound) / trials)
        assert z == pytest.approx(1.959963984540054, rel=1e-9)


def test_wilson_published_example() -> None:
    # Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def accuracies(
    rng: np.random.Generator, problems: int, a: float, b: float, runs: int
) -> np.ndarray:
    """Per-problem means of 8 samples, problems of Beta(a, b) difficulty; (runs, problems)."""
    return rng.binomial(8, rng.beta(a, b, (runs, problems))) / 8


# Half solved; few solved; nearly none; nearly all; a dozen problems.
SITUATIONS = [(168, 0.5, 0.5), (168, 0.3, 2.0), (504, 0.02, 2.0), (168, 2.0, 0.1), (12, 0.5, 0.5)]


@pytest.mark.parametrize(("problems", "a", "b"), SITUATIONS, ids=str)
def test_mean_interval_covers_95_percent(problems: int, a: float, b: float) -> None:
    runs = accuracies(np.random.default_rng(0), problems, a, b, runs=1000)
    truth = a / (a + b)
    covered = []
    for values in runs:
        mean, low, high = mean_interval(values.tolist(), 8)
        assert 0 <= low <= mean <= high <= 1
        assert mean == pytest.approx(values.mean())
        covered.append(low <= truth <= high)
    assert 0.93 <= np.mean(covered) <= 0.975  # 95 % +- 3 standard errors of the simulation


def test_mean_interval_is_the_plain_one_for_many_problems_and_wilson_for_one_sample_each() -> None:
    values = accuracies(np.random.default_rng(1), 5000, 1.0, 1.0, runs=1)[0]
    mean, low, high = mean_interval(values.tolist(), 8)
    half = 1.96 * values.std(ddof=1) / sqrt(5000)
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=2e-5)
    assert mean_interval([1.0] * 300 + [0.0] * 700, 1)[1:] == pytest.approx(
        wilson_interval(300, 1000), abs=2e-4
    )


def test_all_wrong_is_not_known_without_doubt() -> None:
    assert mean_interval([0.0] * 504, 8) == pytest.approx(
        (0.0, 0.0, wilson_interval(0, 504)[1]), abs=1e-4
    )
    assert mean_interval([1.0] * 504, 8)[1] < 0.995


def test_equal_accuracies_are_not_known_without_doubt() -> None:
    """No more is known than that many independent samples would say."""
    mean, low, high = mean_interval([0.25] * 504, 8)
    assert (low, high) == pytest.approx(wilson_interval(504 * 2, 504 * 8), abs=1e-4)
    nearly = mean_interval([0.25] * 503 + [0.375], 8)
    assert nearly == pytest.approx((mean, low, high), abs=1e-3)
    few = mean_interval([0.5, 0.5], 8)
    assert few[1] < 0.05 and few[2] > 0.95, "two problems: one degree of freedom"


@pytest.mark.parametrize(("problems", "p"), [(3, 0.5), (12, 0.3), (168, 0.5)], ids=str)
def test_mean_interval_of_equally_hard_problems_covers_95_percent(problems: int, p: float) -> None:
    runs = np.random.default_rng(4).binomial(8, p, (1000, problems)) / 8
    covered = [low <= p <= high for _, low, high in (mean_interval(r.tolist(), 8) for r in runs)]
    assert np.mean(covered) >= 0.93


@pytest.mark.parametrize("problems", [12, 168])
def test_paired_gain_covers_95_percent_and_beats_the_unpaired_interval(problems: int) -> None:
    rng = np.random.default_rng(2)
    covered, narrower = [], []
    for _ in range(1000):
        skill = rng.beta(0.5, 0.5, problems)
        before, after = rng.binomial(8, 0.8 * skill) / 8, rng.binomial(8, skill) / 8
        gain, low, high = paired_gain(before.tolist(), after.tolist())
        assert gain == pytest.approx(after.mean() - before.mean())
        covered.append(low <= 0.1 <= high)  # the truth: 0.2 of a mean skill of 0.5
        unpaired = 2 * 1.96 * sqrt((before.var(ddof=1) + after.var(ddof=1)) / problems)
        narrower.append(high - low < unpaired)
    assert 0.93 <= np.mean(covered) <= 0.97
    assert np.mean(narrower) > 0.99


@pytest.mark.parametrize(
    ("samples", "correct"), [(1, 0), (1, 1), (8, 0), (8, 1), (8, 3), (8, 8)], ids=str
)
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(samples: int, correct: int) -> None:
    outcomes = [True] * correct + [False] * (samples - correct)
    for k in range(1, samples + 1):
        subsets = list(combinations(outcomes, k))
        assert pass_at_k(samples, correct, k) == pytest.approx(
            sum(map(any, subsets)) / len(subsets)
        )


@pytest.mark.parametrize(
    ("won", "lost"), [(0, 0), (1, 0), (3, 3), (7, 2), (2, 7), (10, 0)], ids=str
)
def test_mcnemar_is_the_sign_flip_test(won: int, lost: int) -> None:
    """p = the share of all ways to flip the changed problems that are at least as lopsided."""
    before = [False] * won + [True] * lost + [True, False, True]
    after = [True] * won + [False] * lost + [True, False, True]
    flips = list(product((-1, 1), repeat=won + lost))
    as_lopsided = sum(abs(sum(flip)) >= abs(won - lost) for flip in flips) / len(flips)
    assert mcnemar(before, after) == pytest.approx(as_lopsided)


def test_mcnemar_takes_hundreds_of_changes() -> None:
    assert mcnemar([False] * 2000 + [True] * 1800, [True] * 2000 + [False] * 1800) == pytest.approx(
        0.00124, rel=0.03  # normal approximation with continuity correction: z = 199 / sqrt(3800) = 3.228
    )  # fmt: skip


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wilson_interval(3, 2), "wilson_interval: .*3 of 2"),
        (lambda: wilson_interval(0, 0), "wilson_interval"),
        (lambda: mean_interval([0.5], 8), "mean_interval: expected two or more"),
        (lambda: mean_interval([0.5, 1.5], 8), r"accuracies in \[0, 1\]"),
        (lambda: mean_interval([0.5, float("nan")], 8), r"accuracies in \[0, 1\]"),
        (lambda: paired_gain([0.5, 1.0], [0.5]), "paired_gain: .*got 2 and 1"),
        (lambda: pass_at_k(8, 9, 1), "pass_at_k"),
        (lambda: pass_at_k(8, 3, 9), "pass_at_k: .*k 9"),
        (lambda: mcnemar([], []), "mcnemar"),
    ],
    ids=range(9),
)
def test_what_makes_no_sense_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
