"""A settings dataclass refuses another type and a number out of its range, by field."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from phimini.model.checked_fields import Range, check


@dataclass(frozen=True)
class Inner:
    share: Annotated[float, Range(0, 1, "[)")] = 0.5


@dataclass(frozen=True)
class Settings:
    inner: Inner = Inner()
    count: Annotated[int, Range(1, 10)] | None = None
    weights: tuple[Annotated[float, Range(0, 1, "(]")], ...] = (1.0,)
    mode: Literal["fast", "exact"] = "fast"
    name: str = "a"
    flag: bool = False


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("inner", Inner(1.0), "inner.share: expected a number from 0 to below 1, got 1.0"),
        ("inner", 3, "inner: expected Inner, got 3"),
        ("count", 11, "count: expected a whole number from 1 to 10 or none, got 11"),
        ("count", 1.0, "count: expected a whole number from 1 to 10 or none, got 1.0"),
        ("count", True, "count: expected a whole number from 1 to 10 or none, got True"),
        ("weights", (0.5, 0), "each is a number above 0 and up to 1, got (0.5, 0)"),
        ("weights", (float("nan"),), "each is a number above 0 and up to 1, got (nan,)"),
        ("weights", [0.5], "expected a list in which each is"),
        ("mode", "fastt", "mode: did you mean fast? expected one of fast, exact, got 'fastt'"),
        ("name", "  ", "name: expected text that is not empty, got '  '"),
        ("name", None, "name: expected text that is not empty, got None"),
        ("flag", 1, "flag: expected true or false, got 1"),
    ],
)
def test_what_a_field_cannot_hold_is_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check(Settings(**{field: value}))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [{}, {"inner": Inner(0)}, {"count": 1}, {"count": 10}, {"weights": (1, 1e-300)}, {"weights": ()}],
    ids=str,
)  # fmt: skip
def test_the_ends_of_a_range_belong_to_it_unless_it_says_otherwise(values: dict) -> None:
    check(Settings(**values))
