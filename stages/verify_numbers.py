r"""Numerals in an answer, read exactly: integers, decimals, fractions, and tuples, sets and lists of them.

Only what is *written as a number* is one. `6*7` and `40+2` have the value 42 but are no numerals: a
policy must not be paid for leaving the work to the verifier. Nothing is evaluated, so nothing can blow up.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from math import gcd

# Longer texts are no answers. Python refuses longer digit strings; the patterns below are quadratic at worst.
MAX_CHARACTERS = 4000
_MAX_EXPONENT = 99
_MAX_WRAPPERS = 8

_PLAIN_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_SIGN = r"(?P<sign>[+-]?)\s*"
# Thousands are groups of exactly three with one separator throughout: `4\,2` and `0,100` are no numbers.
_INTEGER = r"(?:[1-9][0-9]{0,2}(?P<comma>,|\{,\}|\\,)[0-9]{3}(?:(?P=comma)[0-9]{3})*|[0-9]+)"
_DECIMAL = re.compile(rf"{_SIGN}(?P<whole>{_INTEGER})?(?:\.(?P<digits>[0-9]*))?")
_SCIENTIFIC = re.compile(
    rf"{_SIGN}(?P<whole>[0-9])(?:\.(?P<digits>[0-9]+))?"
    r"(?:[eE](?P<e>[+-]?[0-9]{1,3})|\s*(?:\\times|\\cdot)\s*10\s*\^\s*(?:\{\s*(?P<ten>[+-]?[0-9]{1,3})\s*\}|(?P<digit>[0-9])))"
)
_SLASH = re.compile(
    rf"{_SIGN}(?:(?P<whole>[0-9]+) )?\{{?(?P<top>[+-]?[0-9]+)\}}?\s*/\s*\{{?(?P<bottom>[+-]?[0-9]+)\}}?"
)
# LaTeX takes a single digit for an argument without braces: \frac12 is a half.
_FRAC = re.compile(
    rf"{_SIGN}(?P<whole>[0-9]+)?\s*\\frac\s*"
    r"(?:\{\s*(?P<top>[+-]?\s*[0-9]+)\s*\}|(?P<top1>[0-9]))\s*"
    r"(?:\{\s*(?P<bottom>[+-]?\s*[0-9]+)\s*\}|(?P<bottom1>[0-9]))"
)

_WRAPPER = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|mbox|boxed)\s*\{"
)
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_INVISIBLE = re.compile(
    r"(?<!\\)\\(?:(?:left|right|displaystyle|bigl|bigr|big|Bigl|Bigr|Big)(?![A-Za-z])|[!;:$])"
)
_SPACES = re.compile(r"(?:(?<!\\)\\(?:quad(?![A-Za-z])|\s)|~|\s)+")
_UNIT = re.compile(
    r"(?:\\(?:text|mathrm|textrm|mbox)\s*\{(?P<words>[^{}0-9]*)\}(?:\^\{?[0-9]\}?)?"
    r"|\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree|°|\\?%)$"
)
_MULTIPLIER = re.compile(r"hundred|thousand|[mbtr]+illion|dozen", re.IGNORECASE)
_NAME = r"(?:[A-Za-z]|\\[A-Za-z]+)(?:_(?:[A-Za-z0-9]|\{[A-Za-z0-9]+\}))?"
_VARIABLE = re.compile(
    rf"(?P<name>{_NAME}|\({_NAME}(?:\s*,\s*{_NAME})+\))\s*(?:=(?!=)|\\in(?=\s*[\[(\\]))\s*"
)
_COMMA = re.compile(r"(?<![{\\]),")
_AND = re.compile(r"\s*,?\s*\\text\s*\{\s*(?:and|or)\s*\}\s*")


@dataclass(frozen=True, slots=True)
class Number:
    """numerator / denominator, as written: the denominator is positive, common factors stay."""

    numerator: int
    denominator: int = 1
    is_reduced: bool = True
    """false for 2/4 and 84/2: a division that the writer has not carried out"""

    def has_value_of(self, other: "Number") -> bool:
        return self.numerator * other.denominator == other.numerator * self.denominator

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


def normalise(text: str) -> str:
    r"""`text` without what does not change its meaning: $...$, \text{...}, \left, `x =`, units, spaces."""
    text = text.strip()
    if _PLAIN_INTEGER.fullmatch(text):
        return text
    text = re.sub(r"\\[dtc]frac", r"\\frac", text.replace("−", "-"))
    text = _trimmed(_SPACES.sub(" ", _INVISIBLE.sub("", text)))
    for _ in range(_MAX_WRAPPERS):
        before = text
        text = _unwrapped(text)
        text = text[:-1].rstrip() if text.endswith(".") and len(text) > 1 else text
        text = _unnamed(text)
        if (match := _UNIT.search(text)) and match.start() > 0:
            if not _MULTIPLIER.search(match["words"] or ""):
                text = _trimmed(text[: match.start()])
        if text == before:
            break
    return text


def parse_number(text: str) -> Number | None:
    """The number that the normalised `text` is, or None if it is anything else."""
    if _PLAIN_INTEGER.fullmatch(text):
        return Number(int(text))
    if text.startswith("(") and text.endswith(")"):
        if _COMMA.search(text):  # (2,500) is a pair
            return None
        text = text[1:-1].strip()
    if (match := _DECIMAL.fullmatch(text)) and (match["whole"] or match["digits"]):
        return _decimal(match, exponent=0)
    if match := _SCIENTIFIC.fullmatch(text):
        exponent = int(match["e"] or match["ten"] or match["digit"])
        return _decimal(match, exponent) if abs(exponent) <= _MAX_EXPONENT else None
    if match := _SLASH.fullmatch(text):
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
    r"""The tuple, interval, set or bare list of numbers that the normalised `text` is, or None."""
    text = _AND.sub(",", text)
    if "," not in text:
        return None
    if text.startswith(r"\{") and text.endswith(r"\}"):
        brackets, inner = "{}", text[2:-2]
    elif text[0] in "([" and text[-1] in ")]":
        brackets, inner = text[0] + text[-1], text[1:-1]
    else:
        brackets, inner = "{}", text
    parts = _COMMA.split(inner)
    numbers = [parse_number(_trimmed(part)) for part in parts]
    found = tuple(number for number in numbers if number is not None)
    return Sequence(brackets, found) if len(found) == len(parts) else None


def _unnamed(text: str) -> str:
    """`text` without `x =`, or without each in `x = 1, x = 2`; of several names each says whose its value is."""
    match = _VARIABLE.match(text)
    if match is None:
        return text
    again = rf"(?<=[,}}\s]){re.escape(match['name'])}\s*=(?!=)\s*"
    value = re.sub(again, "", text[match.end() :])
    return text if re.search(r",|\\text", value[: max(value.rfind("="), 0)]) else value


def _trimmed(text: str) -> str:
    r"""`text` without white space and `\,` around it."""
    text = text.strip()
    while text.startswith(r"\,"):
        text = text[2:].lstrip()
    while text.endswith(r"\,"):
        text = text[:-2].rstrip()
    return text


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


def _unwrapped(text: str) -> str:
    """`text` without one pair of marks that encloses all of it."""
    for opening, closing in _DELIMITERS:
        length = len(opening)
        if text.startswith(opening) and text.endswith(closing) and len(text) > 2 * length:
            inner = text[length:-length]
            return inner.strip() if opening not in inner else text
    if match := _WRAPPER.match(text):
        if _closing_brace(text, match.end()) == len(text) - 1:
            return text[match.end() : -1].strip()
    if text.startswith("{") and _closing_brace(text, 1) == len(text) - 1:
        return text[1:-1].strip()
    return text


def _closing_brace(text: str, start: int) -> int:
    """Where the group that was opened just before `start` ends; -1 if it does not."""
    depth = 1
    for match in re.compile(r"\\[{}]|[{}]").finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return -1
