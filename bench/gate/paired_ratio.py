"""What was measured in the same rounds, held to each other: the typical ratio, how sure it is, and how many rounds that takes

Rounds on a shared machine are no bell curve: a clock that wanders slows both providers, a neighbour slows whichever runs.
So the estimate is of the ratio within a round, and of its logarithm:

    typical   Hodges and Lehmann's: the median of the means of all pairs of rounds. As good as the mean where noise is
              normal, and not moved by a few rounds that something disturbed
    error     half the distance between the pair means that lie one standard deviation of Wilcoxon's signed-rank
              statistic below and above the middle one (Hollander and Wolfe, Nonparametric Statistical Methods, 3.3)
    band      `LEVEL` quantiles of Student's t with one degree of freedom less than there are rounds, times the error;
              and RUN_TO_RUN, which more rounds do not make smaller

Rounds must be independent for that: the harness gives every one its own copies of the inputs, because where they
happen to lie decides up to 30 % of a short op's time (swiglu's ratio to eager moved by 14 % from run to run before, by
2 % since, with six other processes on each core). What a process never moves again, such as Python's own objects, no
round shows: a plain loop over a dictionary differed by 20 % between processes. Bless several runs together, then: the
baseline's band takes in what lay between them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

LEVEL = 0.995
"""of a band, one-sided: two of one code fall apart by chance once in some thousand comparisons"""
RUN_TO_RUN = 0.01
"""by what share two runs of one code differ on top of what their rounds show: 0.9 to 2 % between six runs here"""
NARROW = 0.02
"""the band's half width, as a share and without RUN_TO_RUN, from which more rounds are not worth their time"""


@dataclass(frozen=True, slots=True)
class Typical:
    """What a value is, and between which two it lies, almost surely."""

    low: float
    mid: float
    high: float

    @property
    def reach(self) -> float:
        """By what factor it may be off."""
        return self.high / self.mid


def typical(samples: Sequence[float], run_to_run: float = RUN_TO_RUN) -> Typical:
    """Of positive samples, one per round. ValueError for fewer than 3, which have no error to speak of."""
    log, error = _log_estimate(samples)
    half = _half_width(error, len(samples)) + max(run_to_run, RUN_TO_RUN)
    return Typical(*(math.exp(log + sign * half) for sign in (-1, 0, 1)))


def _log_estimate(samples: Sequence[float]) -> tuple[float, float]:
    """(Hodges and Lehmann's estimate, its standard error) of the logarithm."""
    n = len(samples)
    if n < 3:
        raise ValueError(f"samples: expected at least 3 rounds, got {n}")
    logs = np.log(samples)
    first, second = np.triu_indices(n)
    means = np.sort((logs[first] + logs[second]) / 2)
    deviation = math.sqrt(n * (n + 1) * (2 * n + 1) / 24)
    middle = (len(means) - 1) / 2
    low, mid, high = np.interp(
        [middle - deviation, middle, middle + deviation], np.arange(len(means)), means
    )
    return float(mid), float(high - low) / 2


def _half_width(error: float, rounds: int) -> float:
    return error * student(LEVEL, rounds - 1)


def student(level: float, freedom: int) -> float:
    """Student's t quantile, by the first terms of its expansion about the normal one (Abramowitz and Stegun 26.7.5):
    within 2 % from 5 degrees of freedom on, 8 % too small at 3."""
    z = NormalDist().inv_cdf(level)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """How many rounds: until the ratio is known well, and between two bounds; or until time is up."""

    at_least: int = 15
    at_most: int = 400
    seconds: float = math.inf
    """once there are `at_least`; wall time on a GPU, the process's CPU time elsewhere"""

    def enough(self, samples: Sequence[float], reference: Sequence[float], spent_s: float) -> bool:
        """After these rounds. Looks whenever there are a fifth more: who looks often finds a lucky moment."""
        rounds = len(samples)
        if rounds < self.at_least:
            return False
        if rounds >= self.at_most or spent_s > self.seconds:
            return True
        looks = rounds == self.at_least or int(math.log(rounds, 1.2)) > int(
            math.log(rounds - 1, 1.2)
        )
        return looks and is_narrow(samples, reference)


def is_narrow(samples: Sequence[float], reference: Sequence[float]) -> bool:
    """Whether the ratio of two measurements of the same rounds is known to NARROW."""
    ratios = [a / b for a, b in zip(samples, reference, strict=True)]
    return _half_width(_log_estimate(ratios)[1], len(ratios)) < NARROW
