r"""The verifier: is the last \boxed{...} of a response the reference answer?

Numbers are compared exactly, in microseconds (`verify_numbers`). Only a reference answer that is no number
asks math-verify (`verify_symbolic`), with a hard time limit. The rules, each against a known way to be
rewarded for nothing or to lose a right answer:
- the last box decides, and it must be closed: an earlier one is never recovered; no box, no answer
- a number must be written as a number: `6*7`, `40+2`, `84/2` and `\sqrt{4}` are work left undone; a fraction
  must be in lowest terms (as the MATH data set's own checker asks)
- `042`, `42.0`, `1,000`, `x=42`, `$42$`, `42\text{ cm}`, `42\%`, `\frac{1}{2}` = `1/2` = `0.5` are spellings;
  `(2,500)` is a pair and `0,100` a list
- a time-out is reported as such and counted, never hidden in a plain "wrong"
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from phimini.stages import verify_symbolic
from phimini.stages.verify_numbers import (
    MAX_CHARACTERS,
    Number,
    Sequence,
    normalise,
    parse_number,
    parse_sequence,
)

Reason = Literal[
    "equal", "different", "no closed box", "empty box", "not a number", "not in lowest terms",
    "work left undone", "unreadable", "timed out",
]  # fmt: skip

_BOX_OR_BRACE = re.compile(r"\\boxed\s*\{|\\[{}]|[{}]")
_WORDS = re.compile(r"\(?([A-Za-z]|[A-Za-z]{2,}(?:[ -][A-Za-z]+)*)\)?")
_UNDONE_COMMAND = re.compile(
    r"\\(?:i*int|oint|sum|prod|lim|binom|dbinom|tbinom|gcd|lcm|max|min|det|bmod|pmod|mod)(?![A-Za-z])|[0-9]\s*!"
)
# `40+2`, but neither the end of `x^2-1`, `\sqrt5-1`, `\pi/2+1` nor the start of `1+2\sqrt{3}`, `1-2x`.
_UNDONE_ARITHMETIC = re.compile(
    r"(?<![\^_/.0-9A-Za-z])[0-9.]++\s*(?:[-+*]|\\(?:cdot|times|div|ast)(?![A-Za-z]))\s*"
    r"[0-9.]++(?!\s*[A-Za-z\\^({])"
)
# `101_2`, `3:30`, `2:3`: math-verify drops the base, and takes a time or a ratio for a division.
_PAIR = re.compile(r"0*([0-9A-Z]+)\s*([_:])\s*\{?0*([0-9]+)\}?", re.IGNORECASE)
_MAX_SYMBOLIC_CHARACTERS = 1000


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the verifier found; true in a condition exactly if the answer is correct."""

    correct: bool
    extracted: str | None
    """what stood in the deciding box; None without a closed one"""
    reason: Reason

    def __bool__(self) -> bool:
        return self.correct


def verify(response: str, answer: str) -> bool:
    r"""Whether the last \boxed{...} of `response` is `answer`; errors as in `judge`."""
    return judge(response, answer).correct


def judge(response: str, answer: str) -> Verdict:
    """The verdict on a response and why. `answer` is the reference: a number, word or LaTeX expression.

    Raises ValueError if `answer` is blank or endless, ImportError if it needs math-verify and that is not installed.
    """
    reference = _reference(answer)
    extracted = extract_answer(response)
    if extracted is None:
        return Verdict(False, None, "no closed box")
    if not extracted:
        return Verdict(False, extracted, "empty box")
    if len(extracted) > MAX_CHARACTERS:
        return Verdict(False, extracted, "unreadable")
    reason = _compare(normalise(extracted), reference)
    return Verdict(reason == "equal", extracted, reason)


def extract_answer(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}` of `text`, stripped; None if there is none or it is not closed.

    Braces nest, and `\{` and `\}` are characters. A box within a closed box is part of the outer one.
    """
    start = text.find(r"\boxed")
    if start < 0:
        return None
    boxes: list[tuple[int, int]] = []  # where the content starts and ends; -1: not closed yet
    open_braces: list[int] = []  # for each open brace its box's place in `boxes`; -1: a plain brace
    for token in _BOX_OR_BRACE.finditer(text, start):
        mark = token[0]
        if mark == "{":
            open_braces.append(-1)
        elif mark == "}":
            box = open_braces.pop() if open_braces else -1
            if box >= 0:
                boxes[box] = (boxes[box][0], token.start())
                del boxes[box + 1 :]
        elif len(mark) > 2:
            open_braces.append(len(boxes))
            boxes.append((token.end(), -1))
    if not boxes or boxes[-1][1] < 0:
        return None
    return text[boxes[-1][0] : boxes[-1][1]].strip()


@dataclass(frozen=True, slots=True)
class _Reference:
    text: str
    number: Number | None
    sequence: Sequence | None
    word: str | None


@lru_cache(maxsize=4096)  # a group of rollouts shares its reference
def _reference(answer: str) -> _Reference:
    if not answer.strip():
        raise ValueError(f"verify: answer: expected a reference answer, got {answer!r}")
    if len(answer) > MAX_CHARACTERS:
        raise ValueError(
            f"verify: answer: expected at most {MAX_CHARACTERS} characters, got {len(answer)}"
        )
    text = normalise(answer)
    number = parse_number(text)
    sequence = parse_sequence(text) if number is None else None
    return _Reference(text, number, sequence, _word(text))


def _word(text: str) -> str | None:
    """A word, a name or a choice such as `(B)`, in lower case; None for anything else."""
    match = _WORDS.fullmatch(text)
    return match[1].lower() if match else None


def _compare(text: str, reference: _Reference) -> Reason:
    if text == reference.text:
        return "equal"
    if reference.number is not None:
        return _compare_exactly(parse_number(text), reference.number)
    if reference.sequence is not None:
        return _compare_exactly(parse_sequence(text), reference.sequence)
    if reference.word is not None:
        return "equal" if _word(text) == reference.word else "different"
    if re.sub(r"\s", "", text) == re.sub(r"\s", "", reference.text):
        return "equal"
    if (got := _PAIR.fullmatch(text)) and (expected := _PAIR.fullmatch(reference.text)):
        alike = [part.upper() for part in got.groups()] == [
            part.upper() for part in expected.groups()
        ]
        return "equal" if alike else "different"
    if "$" in text or len(text) > _MAX_SYMBOLIC_CHARACTERS:
        return "unreadable"
    for undone in (_UNDONE_COMMAND, _UNDONE_ARITHMETIC):
        if undone.search(text) and not undone.search(reference.text):
            return "work left undone"
    return verify_symbolic.shared.compare(text, reference.text)


def _compare_exactly(got: Number | Sequence | None, expected: Number | Sequence) -> Reason:
    if got is None:
        return "not a number"
    assert type(got) is type(expected), f"compared {got} with {expected}"
    if not got.has_value_of(expected):  # pyright: ignore[reportArgumentType]
        return "different"
    return "equal" if got.is_reduced else "not in lowest terms"
