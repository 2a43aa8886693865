r"""Lists in parentheses, and assignments to one name or to several, in all their spellings."""

import pytest

from phimini.stages.verify.text import read_answer
from phimini.stages.verify.verdict import judge

READ = {
    r"\{a=2, a=3\}": (r"\{2, 3\}", "a"),
    "b=3, a=2": ("(2,3)", "(a,b)"),
    r"\{a=2, b=3\}": ("(2,3)", "(a,b)"),
    "(x=1;y=2)": ("(1,2)", "(x,y)"),
    r"f(1)=2\text{ and }f(2)=3": ("(2,3)", "(f(1),f(2))"),
    "x=(7 or 8)": ("7 or 8", "x"),
    "(x<2 or x>5)": ("x<2 or x>5", None),
    "a=2 or b=3": ("a=2 or b=3", None),  # not both
    "x=y, y=2": ("x=y, y=2", None),  # an equation to solve
    r"\{x|x=2\}": (r"\{x|x=2\}", None),
    "(7, 8)": ("(7, 8)", None),
}


@pytest.mark.parametrize("text", READ)
def test_value_and_name(text: str) -> None:
    answer = read_answer(text)
    assert (answer.value, answer.name) == READ[text]


EQUAL = {
    r"x<2 \text{ or } x>5": ["(x<2 or x>5)", r"(x<2\text{ or }x>5)"],
    r"(-\infty,2)\cup(5,\infty)": ["(x<2 or x>5)"],
    "7,8": ["x=(7 or 8)", "(7 or 8)", r"x=(8\text{ or }7)", r"\{x=7, x=8\}"],
    "x=(7 or 8)": ["7,8", "x=7, x=8", "x=7 or x=8", "7 or 8", r"\{8,7\}"],
    r"\pm\sqrt2": [r"\{a=\sqrt2, a=-\sqrt2\}", r"x=(\sqrt2 or -\sqrt2)"],
    "2,3": [r"\{a=2, a=3\}", r"\{x_1=2,x_2=3\}", "x_1=3, x_2=2"],
    r"\{2,3\}": [r"\{a=2, a=3\}", r"\{a=3, a=2\}"],
    "a=2 or a=3": [r"\{a=2, a=3\}"],
    "a=2,b=3": [r"\{a=2, b=3\}", "b=3, a=2", "(a,b)=(2,3)", "(b,a)=(3,2)", "(2,3)", "2,3", "a=2 cm, b=3 cm"],
    "(2,3)": ["a=2,b=3", r"\{a=2, b=3\}", "y=3, x=2"],
    r"(x,y)=(1,\sqrt2)": [r"y=\sqrt2, x=1", r"(y,x)=(\sqrt2,1)", r"(1,\sqrt{2})"],
}  # fmt: skip
DIFFERENT = {
    "(7,8)": ["(7 or 8)"],
    "7": ["x=(7 or 8)"],
    "x<2 or x>5": ["(x<2 or x>6)", "(x<2 and x>5)"],
    "7,8": ["x=(7 or 9)", "x=7"],
    "y=7 or y=8": ["x=(7 or 8)"],
    "2": [r"\{a=2, a=3\}"],
    "b=2,b=3": [r"\{a=2, a=3\}"],
    "a=2,b=3": [r"\{a=3, b=2\}", "(3,2)", "3,2", "(a,b)=(3,2)", "(b,a)=(2,3)", "c=2,d=3", "a=2", "a=2 or b=3"],
    "(2,3)": ["y=2, x=3", "a=2,b=3,c=4"],
    r"x=1,y=\sqrt2": [r"(\sqrt2,1)", r"\sqrt2,1", r"x=\sqrt2,y=1"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("response", "answer", "correct"),
    [
        (response, answer, table is EQUAL)
        for table in (EQUAL, DIFFERENT)
        for answer in table
        for response in table[answer]
    ],
)
def test_verdict(response: str, answer: str, correct: bool) -> None:
    verdict = judge(rf"\boxed{{{response}}}", answer)
    assert verdict.correct == correct, verdict.reason
