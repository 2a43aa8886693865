r"""Verifier of the reward: compare the last \boxed{...} of a response with the reference answer.

Numbers are compared exactly, in microseconds (`numerals.py`). Only a reference answer that is not a number needs
math-verify (`symbolic.py`), with a hard time limit. Each rule prevents a known false positive or false negative:
- A response with thoughts answers after `</think>`. A box in its thoughts does not count.
- The last box decides, and it must be closed. An earlier box is never used; a response without a box has no answer.
- A number must be written as a number: `6*7`, `40+2`, `84/2` and `\sqrt{4}` are unfinished work. A fraction must be in
  lowest terms, as the checker of the MATH data set requires.
- `042`, `42.0`, `1,000`, `$42$`, `４２` and `\frac{1}{2}` = `1/2` = `½` = `0.5` are spellings. `(2,500)` is a pair and
  `0,100` a list.
- A name or a unit (`x=42`, `42\text{ cm}`, `42\%`) may stand on one side only. On both sides they must agree.
- An inequality solved for one name is its interval. `x = y` and `y - x = 0` are one equation.
- A time-out is reported and counted as such, never as a plain "wrong".
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from phimini.stages.verify import symbolic as verify_symbolic
from phimini.stages.verify.intervals import as_interval
from phimini.stages.verify.numerals import (
    MAX_CHARACTERS,
    Number,
    Sequence,
    parse_number,
    parse_sequence,
)
from phimini.stages.verify.text import EQUALS, RELATION, VARIABLE, Answer, read_answer, top_parts

Reason = Literal[
    "equal", "different", "no closed box", "empty box", "not a number", "not in lowest terms",
    "work left undone", "unreadable", "timed out", "too large",
]  # fmt: skip

# Without braces a TeX argument is one digit or letter, but `\boxed 42` is meant as 42, and `\boxed 1½` as 1½.
_DIGIT, _VULGAR, _FRACTION_BAR = "[0-9０-９]", "[¼-¾⅐-⅞]", r"\s*[/／⁄]\s*"
_WHOLE = rf"(?:{_DIGIT}{{1,3}}(?:[,，]{_DIGIT}{{3}})+(?!{_DIGIT})|{_DIGIT}+)"
_FRAC = rf"\\[dtc]?frac\s*(?:\{{[^{{}}]*\}}|{_DIGIT})\s*(?:\{{[^{{}}]*\}}|{_DIGIT})"
_BARE_NUMBER = (
    rf"(?>[-+−－＋]?\s?(?:{_WHOLE}(?:[.．]{_DIGIT}+)?(?:\s?{_VULGAR}|\s?{_FRAC}|{_FRACTION_BAR}{_DIGIT}+)?|{_VULGAR}|{_FRAC}))"
    # What goes on is no number, or a longer one: `7x`, `7^2`, `7,5`, `2\sqrt{3}`.
    rf"(?![0-9A-Za-z０-９]|[.,．，]{_DIGIT}|\s*[\^_]|\s*\\(?:sqrt|pi|[dtc]?frac|cdot|times)(?![A-Za-z]))"
)
_BOX_OR_BRACE = re.compile(
    rf"\\boxed\s*(?:\{{|(?P<bare>{_BARE_NUMBER}|(?<=\s)[A-Z](?![0-9A-Za-z])))|\\[{{}}]|[{{}}]"
)
# The most frequent answers, whose value is their text.
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")
_WORDS = re.compile(r"\(?([A-Za-z]|[A-Za-z]{2,}(?:[ -][A-Za-z]+)*)\)?")
_UNDONE_COMMAND = re.compile(
    r"\\(?:i*int|oint|sum|prod|lim|binom|dbinom|tbinom|gcd|lcm|max|min|det|bmod|pmod|mod)(?![A-Za-z])|[0-9]\s*!"
)
# Matches `40+2`, but neither the end of `x^2-1`, `\sqrt5-1`, `\sqrt 5-1`, `\pi/2+1` nor the start of `1+2\sqrt{3}`, `1-2x`.
_UNDONE_ARITHMETIC = re.compile(
    r"(?<![\^_/.0-9A-Za-z])(?<!\\sqrt )[0-9.]++\s*(?:[-+*]|\\(?:cdot|times|div|ast)(?![A-Za-z]))\s*"
    r"[0-9.]++(?!\s*[A-Za-z\\^({])"
)
# `101_2`, `3:30`, `2:3`: math-verify drops the base, and reads a time or a ratio as a division.
_PAIR = re.compile(r"0*([0-9A-Z]+)\s*([_:])\s*\{?0*([0-9]+)\}?", re.IGNORECASE)
# Each name in `x_1 = 1, x_2 = 2`, for a reference that is a bare list of numbers.
_NAMES = re.compile(r"(^|,|\\\{)\s*[A-Za-z](?:_(?:[A-Za-z0-9]|\{[A-Za-z0-9]+\}))?\s*=\s*")
_MAX_SYMBOLIC_CHARACTERS = 1000


@dataclass(frozen=True, slots=True)
class Verdict:
    """Result of the verifier; truthy exactly if the answer is correct."""

    correct: bool
    extracted: str | None
    """content of the last box; None if it is missing or not closed"""
    reason: Reason

    def __bool__(self) -> bool:
        return self.correct


def verify(response: str, answer: str) -> bool:
    r"""Return True if the last \boxed{...} of `response` is `answer`; errors as in `judge`."""
    return judge(response, answer).correct


def judge(response: str, answer: str) -> Verdict:
    """Return the verdict on a response, with its reason. `answer` is the reference: a number, word or LaTeX.

    Raises ValueError if `answer` is blank or too long, and ImportError if it needs math-verify and that is missing.
    """
    extracted = extract_answer(response)
    if extracted and _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(extracted):
        is_same = extracted == answer
        return Verdict(is_same, extracted, "equal" if is_same else "different")
    reference = _reference(answer)
    if extracted is None:
        return Verdict(False, None, "no closed box")
    if not extracted:
        return Verdict(False, extracted, "empty box")
    if len(extracted) > MAX_CHARACTERS:
        return Verdict(False, extracted, "unreadable")
    reason = _compare(read_answer(extracted), reference)
    return Verdict(reason == "equal", extracted, reason)


def extract_answer(text: str) -> str | None:
    r"""Return the stripped content of the last `\boxed{...}` of `text`, or None if it is missing or not closed.

    Braces nest, and `\{` and `\}` are characters. A box within a closed box is part of the outer one. `\boxed 7` is a
    box too, also with a fraction or full-width digits. In a text with thoughts, only the part after the last `</think>` is read.
    """
    start = max(text.rfind("</think>"), 0)
    stop = text.find("<think>", start)
    stop = len(text) if stop < 0 else stop
    start = text.find(r"\boxed", start, stop)
    if start < 0:
        return None
    end = text.find("}", start)
    if (
        text.startswith("{", start + 6) and text.rfind(r"\boxed") == start
    ):  # the common case: one plain box
        if (
            "{" not in (content := text[start + 7 : end])
            and "\\" not in content
            and 0 <= end < stop
        ):
            return content.strip()
    boxes: list[tuple[int, int]] = []  # start and end of the content; -1: not closed yet
    open_braces: list[int] = []  # index in `boxes` for each open brace; -1: a plain brace
    for token in _BOX_OR_BRACE.finditer(text, start, stop):
        mark = token[0]
        if mark == "{":
            open_braces.append(-1)
        elif mark == "}":
            box = open_braces.pop() if open_braces else -1
            if box >= 0:
                boxes[box] = (boxes[box][0], token.start())
                del boxes[box + 1 :]
        elif token["bare"]:
            boxes.append(token.span("bare"))
        elif len(mark) > 2:
            open_braces.append(len(boxes))
            boxes.append((token.end(), -1))
    if not boxes or boxes[-1][1] < 0:
        return None
    return text[boxes[-1][0] : boxes[-1][1]].strip()


@dataclass(frozen=True, slots=True)
class _Reference:
    answer: Answer
    number: Number | None
    sequence: Sequence | None
    word: str | None
    interval: tuple[str, str] | None
    """its name and interval, if it is an inequality"""
    is_solved: bool
    """False for an inequality such as `2x > y`, which is not an interval"""
    is_equation: bool
    """True for one equation without a name on its left, such as a line's"""
    is_constant: bool
    """True if the value contains no variable"""


@lru_cache(maxsize=4096)  # a group of rollouts shares its reference
def _reference(answer: str) -> _Reference:
    if not answer.strip():
        raise ValueError(f"verify: answer: expected a reference answer, got {answer!r}")
    if len(answer) > MAX_CHARACTERS:
        raise ValueError(
            f"verify: answer: expected at most {MAX_CHARACTERS} characters, got {len(answer)}"
        )
    read = read_answer(answer)
    if read.name is not None and not read.has_plain_name:  # `x+y=3` is a line, not the number 3
        read = Answer(read.text, read.text, None, read.unit)
    interval = as_interval(read.text)
    if interval is not None:
        read = Answer(read.text, interval[1], interval[0])
    number = parse_number(read.value)
    sequence = parse_sequence(read.value) if number is None else None
    is_constant = number is not None or sequence is not None or not VARIABLE.search(read.value)
    is_solved = interval is not None or not RELATION.search(read.value)
    is_equation = EQUALS.search(read.value) is not None and not re.search(r"[,;]", read.value)
    return _Reference(
        read, number, sequence, _word(read.value), interval, is_solved, is_equation, is_constant
    )


def _word(text: str) -> str | None:
    """Return a word, a name or a choice such as `(B)`, in lower case; None for any other text."""
    match = _WORDS.fullmatch(text)
    return match[1].lower() if match else None


def _compare(got: Answer, reference: _Reference) -> Reason:
    expected = reference.answer
    if got.unit and expected.unit and got.unit != expected.unit:
        if "percent" not in (got.unit, expected.unit):
            return "different"
    if got.text == expected.text:
        return "equal"
    interval = as_interval(got.text) if reference.number is None else None
    if interval is not None and reference.is_solved:
        got = Answer(got.text, interval[1], interval[0], got.unit)
    if got.name is not None and expected.name is not None and got.name != expected.name:
        got = _in_order(got, expected.name)
    if got.name is not None and expected.name is not None and got.name != expected.name:
        is_another = reference.is_constant or reference.interval is not None
        return "different" if is_another else _compare_expressions(got.text, expected.text)
    if reference.number is not None:
        return _compare_numbers(parse_number(got.value), got.unit, reference)
    if reference.sequence is not None:
        return _compare_sequences(got, reference.sequence, expected.name)
    if reference.word is not None:
        return "equal" if _word(got.value) == reference.word else "different"
    if EQUALS.search(got.value) or EQUALS.search(expected.value) or not reference.is_solved:
        if expected.name is not None and reference.is_constant:
            return "work left undone"
        if reference.is_equation and not EQUALS.search(got.text):
            return "different"
        return _compare_expressions(got.text, expected.text)
    if reference.interval is not None and interval is None and RELATION.search(got.value):
        return "work left undone"
    return _compare_expressions(got.value, expected.value)


def _compare_numbers(got: Number | None, unit: str | None, reference: _Reference) -> Reason:
    """Compare two numbers. If only one side is in percent, 50 % equals both 50 and 0.5."""
    expected = reference.number
    assert expected is not None, "asked for a number"
    if got is not None and not got.has_value_of(expected):
        if unit == "percent" and reference.answer.unit != "percent":
            got = got.divided_by(100)
        elif unit != "percent" and reference.answer.unit == "percent":
            expected = expected.divided_by(100)
    return _compare_exactly(got, expected)


def _compare_sequences(got: Answer, expected: Sequence, name: str | None) -> Reason:
    """Compare a sequence; in a bare list each element may have a name. For `(a,b)=(2,3)` a list is in order."""
    value = parse_sequence(got.value)
    if name is not None and name.startswith("(") and got.name is None and value is not None:
        value = Sequence(expected.brackets, value.numbers) if value.brackets == "{}" else value
    if got.name is not None and got.name.startswith("(") and expected.brackets == "{}":
        value = parse_sequence(_NAMES.sub(r"\1", got.text))
    return _compare_exactly(value, expected)


def _in_order(got: Answer, names: str) -> Answer:
    """Return `(b,a)=(3,2)` as `(a,b)=(2,3)` if these are the names of the reference; any other answer unchanged."""
    assert got.name is not None, "an answer without a name has no order"
    values = dict(zip(top_parts(got.name[1:-1]), top_parts(got.value[1:-1]), strict=False))
    order = top_parts(names[1:-1])
    is_same = got.name.startswith("(") and len(order) > 1 and values.keys() == set(order)
    if not is_same:
        return got
    return Answer(got.text, f"({','.join(values[name] for name in order)})", names, got.unit)


def _compare_expressions(text: str, expected: str) -> Reason:
    if re.sub(r"\s", "", text) == re.sub(r"\s", "", expected):
        return "equal"
    if (got := _PAIR.fullmatch(text)) and (wanted := _PAIR.fullmatch(expected)):
        alike = [part.upper() for part in got.groups()] == [
            part.upper() for part in wanted.groups()
        ]
        return "equal" if alike else "different"
    if "$" in text or len(text) > _MAX_SYMBOLIC_CHARACTERS:
        return "unreadable"
    for undone in (_UNDONE_COMMAND, _UNDONE_ARITHMETIC):
        if undone.search(text) and not undone.search(expected):
            return "work left undone"
    return verify_symbolic.shared.compare(text, expected)


def _compare_exactly(got: Number | Sequence | None, expected: Number | Sequence) -> Reason:
    if got is None:
        return "not a number"
    assert type(got) is type(expected), f"compared {got} with {expected}"
    if not got.has_value_of(expected):  # pyright: ignore[reportArgumentType]
        return "different"
    return "equal" if got.is_reduced else "not in lowest terms"


def reason_of(question: str, answer: str, response: str, finish_reason: str) -> str:
    """Return the reason of the verdict on a response: `equal` for a right one, `cut off` for one that did not end."""
    return judge(response, answer).reason if finish_reason == "stop" else "cut off"


def is_right(question: str, answer: str, response: str, finish_reason: str) -> bool:
    """Return True for a response that ended by itself, with the reference answer in its last box."""
    return finish_reason == "stop" and verify(response, answer)
