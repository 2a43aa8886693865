"""How sure a measured accuracy is: 95 % intervals, paired gains, pass@k, McNemar's test.

The unit is the problem, never the sample: eight answers to one question are not eight questions.
"""

from collections.abc import Sequence
from functools import cache
from math import atan, comb, cos, inf, pi, sin, sqrt

_CONFIDENCE = 0.95
_Z = 1.959963984540054  # the 97.5 % point of the normal distribution


def wilson_interval(num_correct: int, num_trials: int) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927); never leaves [0, 1], never has width 0."""
    if not 0 <= num_correct <= num_trials or num_trials < 1:
        raise ValueError(
            f"wilson_interval: expected 0 <= num_correct <= num_trials >= 1, got {num_correct} of {num_trials}"
        )
    return _score_interval(num_correct / num_trials, num_trials, _Z)


def mean_interval(values: Sequence[float], num_samples: int) -> tuple[float, float, float]:
    """(mean, low, high) of per-problem accuracies in [0, 1]: Wilson's interval for clustered samples.

    The number of trials is what would give one-sample problems the spread that `values` have,
    n * mean * (1 - mean) / variance (Korn and Graubard 1998), with Student's t for the spread being estimated.
    It is never more than the samples there are, `num_samples` of each problem: accuracies that happen to be equal are
    no surer than that. Where all values are 0 or all are 1 the spread says nothing and each problem counts once, so an
    untrained model's 0 of 500 still has an interval.
    """
    n = len(values)
    if num_samples < 1:
        raise ValueError(f"mean_interval: expected at least one sample, got {num_samples}")
    if n < 2 or not all(0 <= value <= 1 for value in values):
        raise ValueError(
            f"mean_interval: expected two or more accuracies in [0, 1], got {n}: {list(values[:5])}"
        )
    mean = sum(values) / n
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    if mean in (0.0, 1.0):
        trials = float(n)
    else:
        spread = mean * (1 - mean)
        trials = n * min(spread / variance, num_samples) if variance else float(n * num_samples)
    low, high = _score_interval(mean, trials, _student_t(n - 1))
    return mean, low, high


def paired_gain(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """(gain, low, high): mean of after - before over the same problems, with Student's 95 % interval.

    `before[i]` and `after[i]` are one problem's accuracies. Pairing removes how hard the problems are.
    """
    n = len(before)
    if n != len(after) or n < 2:
        raise ValueError(
            f"paired_gain: expected two equally long lists of two or more problems, got {n} and {len(after)}"
        )
    gains = [b - a for a, b in zip(before, after, strict=True)]
    gain = sum(gains) / n
    variance = sum((value - gain) ** 2 for value in gains) / (n - 1)
    half = _student_t(n - 1) * sqrt(variance / n)
    return gain, gain - half, gain + half


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased chance that one of k samples is right: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, eq. 1)."""
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(
            f"pass_at_k: expected 0 <= num_correct <= num_samples and 1 <= k <= num_samples, "
            f"got num_samples {num_samples}, num_correct {num_correct}, k {k}"
        )
    return 1 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Two-sided exact p of "as many problems were won as lost" (McNemar 1947, binomial form)."""
    if len(before) != len(after) or not before:
        raise ValueError(
            f"mcnemar: expected two equally long, non-empty lists, got {len(before)} and {len(after)}"
        )
    won = sum(bool(b) and not a for a, b in zip(before, after, strict=True))
    lost = sum(bool(a) and not b for a, b in zip(before, after, strict=True))
    changed = won + lost
    tail = sum(comb(changed, i) for i in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2**changed)


def _score_interval(mean: float, trials: float, z: float) -> tuple[float, float]:
    centre = (mean + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * sqrt(mean * (1 - mean) / trials + (z / trials) ** 2 / 4)
    # At 0 and 1 the bound is exact; rounding must not put the mean outside its own interval.
    low = 0.0 if mean == 0 else max(0.0, min(centre - half, mean))
    high = 1.0 if mean == 1 else min(1.0, max(centre + half, mean))
    return low, high


@cache
def _student_t(degrees: int) -> float:
    """The 97.5 % point of Student's t distribution, within 1e-4."""
    if degrees > 60:
        # Cornish-Fisher expansion around the normal point (Abramowitz and Stegun 26.7.5).
        z = _Z
        return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    low, high = _Z, 13.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < _CONFIDENCE else (low, middle)
    return (low + high) / 2


def _within(t: float, degrees: int) -> float:
    """P(|T| <= t) for whole degrees of freedom, in closed form (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    assert degrees >= 1 and t < inf, f"Student's t with {degrees} degrees of freedom at {t}"
    angle = atan(t / sqrt(degrees))
    odd = degrees % 2
    term, total = (cos(angle), cos(angle)) if odd else (1.0, 1.0)
    for i in range(2 + odd, degrees - 1, 2):
        term *= (i - 1) / i * cos(angle) ** 2
        total += term
    if not odd:
        return sin(angle) * total
    return 2 / pi * (angle + (sin(angle) * total if degrees > 1 else 0.0))
