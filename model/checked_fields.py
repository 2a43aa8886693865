"""Types and ranges of a settings dataclass, written beside its fields and checked in one place.

    steps: Annotated[int, Range(1, 1000)]

`check` refuses a field that holds another type or a number out of its range, wherever the dataclass was built: from
words of a command line or in a user's own Python. `Range` is a class of our own, not annotated_types, because nothing
that PhiMini needs at run time depends on that package; typeguard checks types but not ranges.
"""

import dataclasses
import reprlib
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from phimini.model.suggest import nearest

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = 100
_SHORT.maxtuple = 3
_NAMES = {
    int: "a whole number", float: "a number", bool: "true or false", str: "text that is not empty", NoneType: "none"
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Range:
    """The numbers from `low` to `high`; a round bracket in `ends` excludes that end."""

    low: float
    high: float
    ends: Literal["[]", "(]", "[)"] = "[]"

    def __contains__(self, number: float) -> bool:
        excluded = {self.low: self.ends[0] == "(", self.high: self.ends[1] == ")"}
        return self.low <= number <= self.high and not excluded.get(number, False)

    def __str__(self) -> str:
        start = f"above {self.low} and up to" if self.ends[0] == "(" else f"from {self.low} to"
        return f"{start} {'below ' if self.ends[1] == ')' else ''}{self.high}"


@cache
def fields_of(kind: type) -> dict[str, Any]:
    """Return the fields of a dataclass with their annotated types, in the order of their declaration."""
    return get_type_hints(kind, include_extras=True)


def bare(kind: Any) -> Any:
    """Return a type without the marks of `Annotated`."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, UnionType)


def check(settings: Any, prefix: str = "") -> None:
    """Raise ValueError for the first field, at any depth, that holds another type or a number out of its range."""
    for name, kind in fields_of(type(settings)).items():
        value = getattr(settings, name)
        if not _fits(value, kind):
            if isinstance(value, tuple) and get_origin(get_args(kind)[0]) is Literal:
                value = next(word for word in value if not _fits(word, get_args(kind)[0]))
            got = _SHORT.repr(value)
            raise ValueError(f"{prefix}{name}: {_expected(kind, str(value))}, got {got}")
        if dataclasses.is_dataclass(value):
            check(value, f"{prefix}{name}.")


def _fits(value: Any, kind: Any) -> bool:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        ranges = [mark for mark in arguments if isinstance(mark, Range)]
        return _fits(value, arguments[0]) and all(value in each for each in ranges)
    if origin is Literal:
        return value in arguments
    if is_union(kind):
        return any(_fits(value, each) for each in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(each, arguments[0]) for each in value)
    if kind is str:
        return isinstance(value, str) and value.strip() != ""
    return type(value) is kind or (kind is float and type(value) is int)


def _expected(kind: Any, value: str) -> str:
    choices = [
        choice
        for each in (kind, *get_args(kind))
        if get_origin(each) is Literal
        for choice in get_args(each)
    ]
    return nearest(value, choices) if choices else f"expected {_described(kind)}"


def _described(kind: Any) -> str:
    if get_origin(kind) is Annotated:
        inner, *marks = get_args(kind)
        return " ".join(
            [_described(inner), *(str(mark) for mark in marks if isinstance(mark, Range))]
        )
    if is_union(kind):
        return " or ".join(map(_described, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"a list in which each is {_described(get_args(kind)[0])}"
    return _NAMES.get(kind) or kind.__name__
