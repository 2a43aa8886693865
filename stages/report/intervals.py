"""95 % intervals of measured accuracies, paired gains, pass@k and McNemar's test.

The unit is the problem, never the sample: eight answers to one question are not eight questions. The quantiles and
tests come from scipy.stats. Our own are the interval of clustered samples and pass@k, which scipy does not have.
"""

from collections.abc import Sequence
from math import comb, sqrt

import numpy as np
from scipy import stats

_CONFIDENCE = 0.95


def wilson_interval(num_correct: int, num_trials: int) -> tuple[float, float]:
    """Return the 95 % score interval (low, high) of a proportion (Wilson 1927).

    It stays inside [0, 1] and its width is never 0. Raises ValueError unless 0 <= num_correct <= num_trials >= 1.
    """
    if not 0 <= num_correct <= num_trials or num_trials < 1:
        raise ValueError(
            f"wilson_interval: expected 0 <= num_correct <= num_trials >= 1, got {num_correct} of {num_trials}"
        )
    low, high = stats.binomtest(num_correct, num_trials).proportion_ci(_CONFIDENCE, "wilson")
    return float(low), float(high)


def mean_interval(values: Sequence[float], num_samples: int) -> tuple[float, float, float]:
    """Return (mean, low, high) of per-problem accuracies in [0, 1]: Wilson's interval for clustered samples.

    The number of trials is the one at which single-sample problems would have the variance of `values`,
    n * mean * (1 - mean) / variance (Korn and Graubard 1998). The quantile is Student's t, because the variance is an
    estimate. There are at most `num_samples` trials per problem, so accuracies that are equal by chance do not make
    the interval too narrow. If all values are 0, or all are 1, the variance tells nothing and each problem counts as
    one trial: an untrained model's 0 of 500 still has an interval.

    Raises ValueError for fewer than two values, a value outside [0, 1], or num_samples < 1.
    """
    n = len(values)
    if num_samples < 1:
        raise ValueError(f"mean_interval: expected at least one sample, got {num_samples}")
    if n < 2 or not all(0 <= value <= 1 for value in values):
        raise ValueError(
            f"mean_interval: expected two or more accuracies in [0, 1], got {n}: {list(values[:5])}"
        )
    mean = sum(values) / n
    variance = float(np.var(values, ddof=1))
    if mean in (0.0, 1.0):
        trials = float(n)
    else:
        spread = mean * (1 - mean)
        trials = n * min(spread / variance, num_samples) if variance else float(n * num_samples)
    low, high = _score_interval(mean, trials, _student_t(n - 1))
    return mean, low, high


def paired_gain(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """Return (gain, low, high): the mean of after - before over the same problems, with Student's 95 % interval.

    `before[i]` and `after[i]` are the accuracies of one problem. Pairing removes the problems' difficulty from the
    variance. Raises ValueError unless both lists have the same length of at least two.
    """
    n = len(before)
    if n != len(after) or n < 2:
        raise ValueError(
            f"paired_gain: expected two equally long lists of two or more problems, got {n} and {len(after)}"
        )
    gains = np.subtract(after, before, dtype=float)
    gain = float(gains.mean())
    half = _student_t(n - 1) * float(stats.sem(gains))
    return gain, gain - half, gain + half


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the unbiased estimate that one of k samples is right: 1 - C(n - c, k) / C(n, k).

    Source: Chen et al. 2021, equation 1. Raises ValueError for counts that do not fit together.
    """
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(
            f"pass_at_k: expected 0 <= num_correct <= num_samples and 1 <= k <= num_samples, "
            f"got num_samples {num_samples}, num_correct {num_correct}, k {k}"
        )
    return 1 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Return the exact two-sided p-value of "as many problems were won as lost" (McNemar 1947, binomial form).

    It is 1 if no problem changed. Raises ValueError unless both lists have the same length of at least one.
    """
    if len(before) != len(after) or not before:
        raise ValueError(
            f"mcnemar: expected two equally long, non-empty lists, got {len(before)} and {len(after)}"
        )
    won = sum(bool(b) and not a for a, b in zip(before, after, strict=True))
    lost = sum(bool(a) and not b for a, b in zip(before, after, strict=True))
    return float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0


def _score_interval(mean: float, trials: float, quantile: float) -> tuple[float, float]:
    """Return Wilson's interval for a number of trials that need not be whole."""
    squared = quantile * quantile / trials
    centre = (mean + squared / 2) / (1 + squared)
    half = quantile / (1 + squared) * sqrt(mean * (1 - mean) / trials + squared / trials / 4)
    # At 0 and 1 the bound is exact. Rounding must not put the mean outside its own interval.
    low = 0.0 if mean == 0 else max(0.0, min(centre - half, mean))
    high = 1.0 if mean == 1 else min(1.0, max(centre + half, mean))
    return low, high


def _student_t(degrees: int) -> float:
    """Return the 97.5 % point of Student's t distribution."""
    return float(stats.t.ppf((1 + _CONFIDENCE) / 2, degrees))
