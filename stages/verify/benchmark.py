"""The verdicts on a benchmark's response: by our rule, which is the reward's, and by the lenient one."""

import re
from typing import NamedTuple

from phimini.stages.verify import symbolic, verdict
from phimini.stages.verify.numerals import MAX_CHARACTERS, parse_number
from phimini.stages.verify.text import read_answer


class Judged(NamedTuple):
    """Both verdicts on a response."""

    strict: bool
    """by our rule: ended by itself, with the reference answer in its last box"""
    lenient: bool
    """by math-verify as lighteval uses it (`lenient.py`)"""
    reason: str
    """of our verdict"""
    extracted: str | None
    """content of the last box"""
    vote: str | None
    """that answer in one spelling, for a majority; None without one, and for a response that was cut off"""


def judged(question: str, answer: str, response: str, finish_reason: str) -> Judged:
    """Return both verdicts. Raises as `verdict.judge`."""
    own = verdict.judge(response, answer)
    lenient = symbolic.lenient.compare(response, answer) == "equal"
    if finish_reason != "stop":
        return Judged(False, lenient, "cut off", own.extracted, None)
    return Judged(own.correct, lenient, own.reason, own.extracted, _vote(own.extracted))


def _vote(extracted: str | None) -> str | None:
    if not extracted or len(extracted) > MAX_CHARACTERS:
        return None
    value = read_answer(extracted).value
    number = parse_number(value)
    return re.sub(r"\s", "", value) if number is None else str(number.as_fraction())
