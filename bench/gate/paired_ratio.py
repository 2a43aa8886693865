"""The typical value of paired rounds with a confidence band, and the number of rounds that makes it narrow.

A shared machine disturbs single rounds, and its clock slows both providers of a round alike. The estimate is therefore
made from the logarithms of the ratios within each round: their mean without the outer fifths, with Student's interval
for trimmed means (Tukey and McLaughlin 1963; `scipy.stats.mstats.trimmed_mean_ci`).

Rounds must be independent: the harness copies the inputs anew in each, because their place in memory decides up to 30 %
of a short op's time. Effects that last as long as a process, such as the place of Python's own objects, show in no
round. Blessing several runs together puts such effects into the baseline's band.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

TRIMMED = 0.2
"""share of the rounds left out at either end"""
LEVEL = 0.995
"""one-sided confidence of a band: two runs of the same code differ by chance once in some thousand comparisons"""
RUN_TO_RUN = 0.01
"""relative difference between two runs of the same code beyond what their rounds show: 0.9 to 2 % between six runs"""
NARROW = 0.02
"""relative half width of a band, RUN_TO_RUN excluded, at which further rounds are not worth their time"""


@dataclass(frozen=True, slots=True)
class Typical:
    """An estimate with its lower and upper bounds."""

    low: float
    mid: float
    high: float

    @property
    def reach(self) -> float:
        """The factor by which the estimate may be off."""
        return self.high / self.mid


def typical(samples: Sequence[float], run_to_run: float = RUN_TO_RUN) -> Typical:
    """Estimate the typical value of positive samples, one per round. ValueError for fewer than 3 samples."""
    log, half = _log_estimate(samples)
    half += max(run_to_run, RUN_TO_RUN)
    return Typical(*(math.exp(log + sign * half) for sign in (-1, 0, 1)))


def _log_estimate(samples: Sequence[float]) -> tuple[float, float]:
    """Return (trimmed mean, half width of its band) of the logarithms."""
    if len(samples) < 3:
        raise ValueError(f"samples: expected at least 3 rounds, got {len(samples)}")
    low, high = stats.mstats.trimmed_mean_ci(
        np.log(samples), limits=(TRIMMED, TRIMMED), alpha=2 * (1 - LEVEL)
    )
    return float(low + high) / 2, float(high - low) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """A stopping rule: enough rounds to know the ratio well, within bounds on their number and time."""

    at_least: int = 15
    at_most: int = 400
    seconds: float = math.inf
    """applied after `at_least` rounds; wall time on a GPU, the process's CPU time elsewhere"""

    def enough(self, samples: Sequence[float], reference: Sequence[float], spent_s: float) -> bool:
        """Return True to stop. The band is examined only each time the rounds have grown by a fifth, because frequent
        looks would stop at a lucky moment."""
        rounds = len(samples)
        if rounds < self.at_least:
            return False
        if rounds >= self.at_most or spent_s > self.seconds:
            return True
        grown = int(math.log(rounds, 1.2)) > int(math.log(rounds - 1, 1.2))
        return (rounds == self.at_least or grown) and is_narrow(samples, reference)


def is_narrow(samples: Sequence[float], reference: Sequence[float]) -> bool:
    """Return True if the band of the ratio between two providers of the same rounds is narrower than NARROW."""
    return _log_estimate([a / b for a, b in zip(samples, reference, strict=True)])[1] < NARROW
