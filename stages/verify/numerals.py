r"""Exact parser of numerals in an answer: integers, decimals, fractions, and tuples, sets and lists of them.

A numeral must be *written as a number*. `6*7` and `40+2` have the value 42 but are not numerals, because a policy must
not be rewarded for leaving the work to the verifier. The parser evaluates no expression, so its cost is bounded.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from math import gcd

from phimini.stages.verify.text import AND, trimmed
from phimini.stages.verify.units import split_unit

# Longer texts are rejected. Python refuses longer digit strings, and the patterns below are quadratic at worst.
MAX_CHARACTERS = 4000
_MAX_EXPONENT = 99

_PLAIN_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_SIGN = r"(?P<sign>[+-]?)\s*"
# Thousands are groups of exactly three digits with one separator throughout: `4\,2` and `0,100` are not numbers.
_INTEGER = r"(?:[1-9][0-9]{0,2}(?P<comma>,|\{,\}|\\,)[0-9]{3}(?:(?P=comma)[0-9]{3})*|[0-9]+)"
_DECIMAL = re.compile(rf"{_SIGN}(?P<whole>{_INTEGER})?(?:\.(?P<digits>[0-9]*))?")
_SCIENTIFIC = re.compile(
    rf"{_SIGN}(?P<whole>[0-9])(?:\.(?P<digits>[0-9]+))?"
    r"(?:[eE](?P<e>[+-]?[0-9]{1,3})|\s*(?:\\times|\\cdot)\s*10\s*\^\s*(?:\{\s*(?P<ten>[+-]?[0-9]{1,3})\s*\}|(?P<digit>[0-9])))"
)
_SLASH = re.compile(
    rf"{_SIGN}(?:(?P<whole>[0-9]+) )?\{{?(?P<top>[+-]?[0-9]+)\}}?\s*/\s*\{{?(?P<bottom>[+-]?[0-9]+)\}}?"
)
# Without braces a LaTeX argument is a single digit: \frac12 is one half.
_FRAC = re.compile(
    rf"{_SIGN}(?P<whole>[0-9]+)?\s*\\frac\s*"
    r"(?:\{\s*(?P<top>[+-]?\s*[0-9]+)\s*\}|(?P<top1>[0-9]))\s*"
    r"(?:\{\s*(?P<bottom>[+-]?\s*[0-9]+)\s*\}|(?P<bottom1>[0-9]))"
)

_COMMA = re.compile(r"(?<![{\\]),")


@dataclass(frozen=True, slots=True)
class Number:
    """A fraction as written: the denominator is positive, and common factors stay."""

    numerator: int
    denominator: int = 1
    is_reduced: bool = True
    """False for 2/4 and 84/2, a division that the writer has not carried out"""

    def has_value_of(self, other: "Number") -> bool:
        return self.numerator * other.denominator == other.numerator * self.denominator

    def divided_by(self, divisor: int) -> "Number":
        return Number(self.numerator, self.denominator * divisor, self.is_reduced)

    def negative(self) -> "Number":
        return Number(-self.numerator, self.denominator, self.is_reduced)

    def as_fraction(self) -> Fraction:
        return Fraction(self.numerator, self.denominator)


@dataclass(frozen=True, slots=True)
class Sequence:
    """Two or more numbers between brackets, or in a bare list (which is compared like a set)."""

    brackets: str  # "()", "[)", "{}"; "{}" for a bare list too
    numbers: tuple[Number, ...]

    def has_value_of(self, other: "Sequence") -> bool:
        if self.brackets != other.brackets or len(self.numbers) != len(other.numbers):
            return False
        ours, theirs = list(self.numbers), list(other.numbers)
        if self.brackets == "{}":
            ours.sort(key=Number.as_fraction)
            theirs.sort(key=Number.as_fraction)
        return all(a.has_value_of(b) for a, b in zip(ours, theirs, strict=True))

    @property
    def is_reduced(self) -> bool:
        return all(number.is_reduced for number in self.numbers)


def parse_number(text: str) -> Number | None:
    """Return the number that the normalised `text` denotes, or None."""
    if _PLAIN_INTEGER.fullmatch(text):
        return Number(int(text))
    is_command = text.startswith("\\")  # only the last pattern starts with one
    if not is_command:
        if (match := _DECIMAL.fullmatch(text)) and (match["whole"] or match["digits"]):
            return _decimal(match, exponent=0)
        if match := _SCIENTIFIC.fullmatch(text):
            exponent = int(match["e"] or match["ten"] or match["digit"])
            return _decimal(match, exponent) if abs(exponent) <= _MAX_EXPONENT else None
    if not is_command and (match := _SLASH.fullmatch(text)):
        top, bottom = match["top"], match["bottom"]
    elif match := _FRAC.fullmatch(text):
        top, bottom = match["top"] or match["top1"], match["bottom"] or match["bottom1"]
    else:
        return None
    if match["whole"] is None:
        return _fraction(match["sign"], 0, top, bottom)
    if top.isdigit() and bottom.isdigit() and int(top) < int(bottom):  # 3\frac12 = 3 + 1/2
        return _fraction(match["sign"], int(match["whole"]), top, bottom)
    return None


def parse_sequence(text: str) -> Sequence | None:
    r"""Return the tuple, interval, set or bare list of numbers that the normalised `text` denotes, or None.

    In a set or list `\pm 5` means 5 and -5.
    """
    text = AND.sub(",", text)
    if "," not in text and r"\pm" not in text:
        return None
    if text.startswith(r"\{") and text.endswith(r"\}"):
        brackets, inner = "{}", text[2:-2]
    elif text[0] in "([" and text[-1] in ")]":
        brackets, inner = text[0] + text[-1], text[1:-1]
    else:
        brackets, inner = "{}", text
    numbers: list[Number] = []
    for part in _COMMA.split(inner):
        part = trimmed(part)
        has_both_signs = brackets == "{}" and part.startswith(r"\pm")
        number = parse_number(
            trimmed(split_unit(part.removeprefix(r"\pm") if has_both_signs else part)[0])
        )
        if number is None:
            return None
        numbers += [number, number.negative()] if has_both_signs else [number]
    return Sequence(brackets, tuple(numbers))


def _decimal(match: re.Match[str], exponent: int) -> Number:
    digits = (match["digits"] or "").rstrip("0")
    whole = re.sub(r"[^0-9]", "", match["whole"] or "0")
    exponent -= len(digits)
    value = int(match["sign"] + whole + digits) * 10 ** max(exponent, 0)
    return Number(value, 10 ** max(-exponent, 0))


def _fraction(sign: str, whole: int, top: str, bottom: str) -> Number | None:
    numerator, denominator = int(top.replace(" ", "")), int(bottom.replace(" ", ""))
    if denominator == 0:
        return None
    is_reduced = gcd(numerator, denominator) == 1 or numerator == 0
    numerator += whole * denominator
    flip = (-1 if sign == "-" else 1) * (-1 if denominator < 0 else 1)
    return Number(flip * numerator, abs(denominator), is_reduced)
