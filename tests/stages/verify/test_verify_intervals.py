r"""Solved inequalities become intervals; others are unfinished work."""

import pytest

from phimini.stages.verify.intervals import as_interval
from phimini.stages.verify.verdict import judge

INTERVALS = {
    "0<x<5": ("x", "(0,5)"),
    r"0 \le x_1 < 5": ("x_1", "[0,5)"),
    r"5 \ge x > 0": ("x", "(0,5]"),
    "x>5": ("x", r"(5,\infty)"),
    "5<x": ("x", r"(5,\infty)"),
    r"x \le -\sqrt{2}": ("x", r"(-\infty,-\sqrt{2}]"),
    r"x \ne 2": ("x", r"(-\infty,2) \cup (2,\infty)"),
    r"x<2 \text{ or } x>5": ("x", r"(-\infty,2) \cup (5,\infty)"),
    "x>2 and x<5": ("x", "(2,5)"),
    r"\{x \mid x>5\}".replace(r"\mid", "|"): ("x", r"(5,\infty)"),
    r"\{x\in\mathbb{R} : 0<x<5\}": ("x", "(0,5)"),
    r"\{x|0<x<5, x\in\mathbb{R}\}": ("x", "(0,5)"),
    "f(x)>0": ("f(x)", r"(0,\infty)"),
}
NO_INTERVALS = [
    "2x>4", "x+1<3", "x<y", "0<x>5", "x>", "<5", "42", "(0,5)", r"\{1,2\}", r"\{x|y>5\}", "x<2 or y>5", r"x^2<4",
    r"\{x \in \mathbb{Z} : x>5\}", r"\pi<4", "0<1<2", r"|x|<3",
]  # fmt: skip


@pytest.mark.parametrize("text", INTERVALS)
def test_a_solved_inequality_is_an_interval(text: str) -> None:
    assert as_interval(text) == INTERVALS[text]


@pytest.mark.parametrize("text", NO_INTERVALS)
def test_what_is_not_solved_for_one_name_is_none(text: str) -> None:
    assert as_interval(text) is None


@pytest.mark.parametrize(
    ("response", "answer", "correct"),
    [
        (r"m\geq\sqrt2", r"m\in[\sqrt2,\infty)", True), (r"[\sqrt2,\infty)", r"m\ge\sqrt2", True),
        (r"\left\{x\,\middle|\,x>5\right\}", r"(5,\infty)", True), (r"k \ge 2", r"k \geqslant 2", True), ("5<x", "x>5", True),
        (r"x<2\text{ or }x>5", r"(-\infty,2)\cup(5,\infty)", True), (r"x\ne2", r"(-\infty,2)\cup(2,\infty)", True),
        (r"(2,\infty)\cup(-\infty,2)", r"x\neq 2", True), ("x<y", "y>x", True),
        (r"x\ge5", "x>5", False), ("x<5", "x>5", False), ("y>5", "x>5", False), ("2x>10", "x>5", False),
        (r"\{x|x>5\}", r"\{x|x\ge5\}", False), ("x<2 or x>5", "x<2 or x>6", False), ("x<2 and x>5", "x<2 or x>5", False),
        (r"x>10^{-20}\sqrt2", r"x>10^{-21}\sqrt2", False), (r"x>5", r"(\sqrt{26},\infty)", False),
    ],
)  # fmt: skip
def test_inequality_and_interval_are_one_answer(response: str, answer: str, correct: bool) -> None:
    assert judge(rf"\boxed{{{response}}}", answer).correct == correct
