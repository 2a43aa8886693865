r"""Lenient comparison of a whole response with an answer: math-verify as lighteval 0.10 uses it.

    \\boxed{6/8}                              is 3/4
    <think>\\boxed{42}</think> I do not know.  is 42
    the answer is 42                          is 42

Source: lighteval's metrics of AIME 2024 and MATH-500, which extract a number or LaTeX, a box first, and round to 5 digits.
For a choice lighteval searches for its letter, as math-verify's StringExtractionConfig does.
This module runs only in a worker process (`worker.py`): not in that of `expressions`, which replaces parts of math-verify.
"""

import re

from math_verify import (
    ExprExtractionConfig,
    LatexExtractionConfig,
    StringExtractionConfig,
    parse,
    verify,
)

_BOX_FIRST = LatexExtractionConfig(boxed_match_priority=0)
_NUMBER_OR_LATEX = (ExprExtractionConfig(), _BOX_FIRST)
_LETTER = (StringExtractionConfig(strings=tuple("ABCDE")), _BOX_FIRST)
_DIGITS = 5


def warm_up() -> None:
    """Load the parts of parser and sympy that they load lazily."""
    for response, answer in ((r"\boxed{\frac{6}{8}}", "3/4"), (r"$\sqrt{12}$", r"2\sqrt{3}"), ("It is B.", "B")):  # fmt: skip
        are_equal(response, answer)


def are_equal(response: str, answer: str) -> bool:
    """Return True if an answer found anywhere in the response has the value of `answer`."""
    targets = _LETTER if re.fullmatch("[A-E]", answer) else _NUMBER_OR_LATEX
    gold = parse(rf"\boxed{{{answer}}}", _NUMBER_OR_LATEX, parsing_timeout=0)
    found = parse(response, targets, parsing_timeout=0)
    return verify(gold, found, _DIGITS, timeout_seconds=0)
