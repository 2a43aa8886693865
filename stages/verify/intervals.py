r"""Conversion of inequalities and set-builder notation to intervals.

`0 < x \le 5`, `x \in (0,5]` and `\{x \mid 0<x\le5\}` are the same interval. An inequality must be solved for one name:
`2x > 4` and `x + 1 < 3` are unfinished work and stay inequalities.
"""

import re

from phimini.stages.verify.text import RELATION, SIMPLE_NAME, name_spelling, trimmed

_SET_BUILDER = re.compile(
    r"\\\{\s*(?P<name>[^|:{}]*(?:\{[^{}]*\}[^|:{}]*)?)\s*[|:](?P<condition>.*)\\\}", re.DOTALL
)
_REALS = re.compile(
    r"\s*\\in\s*(?:\\(?:mathbb|mathbf|Bbb)\s*\{?\s*R\s*\}?|\\R(?![A-Za-z])|R(?![A-Za-z]))\s*"
)
_EITHER = re.compile(
    r"\s*,?\s*(?:\\(?:text|mbox|mathrm)\s*\{\s*or\s*\}|(?<![A-Za-z\\])or(?![A-Za-z])|\\(?:lor|vee)(?![A-Za-z]))\s*"
)
_BOTH = re.compile(
    r"\s*(?:,|\\(?:text|mbox|mathrm)\s*\{\s*and\s*\}|(?<![A-Za-z\\])and(?![A-Za-z])|\\(?:land|wedge)(?![A-Za-z]))\s*"
)
_REVERSED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}


def as_interval(text: str) -> tuple[str, str] | None:
    """Return the name and the interval (or union) of inequalities in one name; None for any other text."""
    if not RELATION.search(text):
        return None
    builder = _SET_BUILDER.fullmatch(text)
    if builder is not None:
        name = trimmed(_REALS.sub("", builder["name"]))
        found = _region(trimmed(builder["condition"]))
        return found if found is not None and found[0] == name_spelling(name) else None
    return _region(text)


def _region(text: str) -> tuple[str, str] | None:
    """Return the union over `or` of the intersections over `and` of simple inequalities in one name."""
    names: set[str] = set()
    union: list[str] = []
    for alternative in _EITHER.split(text):
        parts: list[str] = []
        for condition in _BOTH.split(alternative):
            if SIMPLE_NAME.fullmatch(_REALS.sub("", condition)) and _REALS.search(condition):
                continue
            found = _simple(condition)
            if found is None:
                return None
            names.add(found[0])
            parts.append(found[1])
        if not parts:
            return None
        union.append(_intersection(parts))
    return (names.pop(), r" \cup ".join(union)) if len(names) == 1 else None


def _intersection(parts: list[str]) -> str:
    r"""Return `[-2,1)` for `[-2,\infty)` and `(-\infty,1)`; other parts stay an intersection."""
    lower = [part for part in parts if part.endswith(r",\infty)") and r"\cup" not in part]
    upper = [part for part in parts if part.startswith(r"(-\infty,") and r"\cup" not in part]
    if len(parts) == 2 and len(lower) == len(upper) == 1:
        return lower[0].removesuffix(r"\infty)") + upper[0].removeprefix(r"(-\infty,")
    return r" \cap ".join(parts)


def _simple(text: str) -> tuple[str, str] | None:
    r"""Return `a < x \le b`, `x > a` or `a > x` as an interval."""
    parts = RELATION.split(text)
    if len(parts) == 3 and not SIMPLE_NAME.fullmatch(parts[0]):
        parts = [parts[2], _REVERSED[parts[1]], parts[0]]
    if len(parts) == 3 and SIMPLE_NAME.fullmatch(parts[0]):
        name, relation, bound = parts
        if not bound.strip() or SIMPLE_NAME.fullmatch(bound):
            return None
        interval = {
            "<": rf"(-\infty,{bound})", r"\le": rf"(-\infty,{bound}]", ">": rf"({bound},\infty)", r"\ge": rf"[{bound},\infty)",
            r"\ne": rf"(-\infty,{bound}) \cup ({bound},\infty)",
        }[relation]  # fmt: skip
        return name_spelling(name), interval
    if len(parts) == 5 and SIMPLE_NAME.fullmatch(parts[2]):
        low, first, name, second, high = parts
        if first in (">", r"\ge") and second in (">", r"\ge"):
            low, first, second, high = high, _REVERSED[second], _REVERSED[first], low
        if low and high and first in ("<", r"\le") and second in ("<", r"\le"):
            return name_spelling(
                name
            ), f"{'(' if first == '<' else '['}{low},{high}{')' if second == '<' else ']'}"
    return None
