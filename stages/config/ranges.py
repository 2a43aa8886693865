"""Ranges of the numbers in a run's config."""

from typing import Annotated

from phimini.model.checked_fields import Range

Count = Annotated[int, Range(1, 10**9)]
CountOrZero = Annotated[int, Range(0, 10**9)]
AtLeastTwo = Annotated[int, Range(2, 10**9)]
Seed = Annotated[int, Range(-(2**63), 2**63 - 1)]
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, "(]")]
BelowOne = Annotated[float, Range(0, 1, "[)")]
Positive = Annotated[float, Range(0, 1_000_000, "(]")]
AboveOne = Annotated[float, Range(1, 1_000_000, "(]")]
NotNegative = Annotated[float, Range(0, 1_000_000)]
Seconds = Annotated[float, Range(1, 1_000_000)]
