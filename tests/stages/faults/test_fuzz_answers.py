r"""Random answers, LaTeX of all kinds and bombs: the verifier gives each a verdict within its limit."""

import random
from typing import get_args

import pytest
from fuzz import fuzz

from phimini.stages.verify.verdict import Reason, judge

ATOMS = [
    "1", "2", "42", "-3", "0.5", "1,000", r"\pi", "x", "y", "e", r"\sqrt{2}", r"\frac{1}{2}", r"\frac12", "10^{9}", "(1,2)", "[0,1)",
    r"\{1,2\}", r"\text{cm}", r"\text{yes}", "B", r"\infty", "i", r"\alpha", "_2", r"^\circ", r"\%", "$", r"\$", r"\left(", r"\right)",
    r"\,", r"\!", " ", "~", ",", ";", "=", "<", ">", r"\le", r"\cup", r"\cap", r"\in", "|", "!", r"\begin{pmatrix}1\\2\end{pmatrix}",
    r"\overline{3}", r"\dots", r"\pm", r"\sum_{n=1}^{10}", r"\int_0^1", "dx", r"\lim_{x\to0}", r"\binom{5}{2}", r"\log_2", r"\sin",
    r"\boxed{", "}", "{", r"\{", r"\}", r"\\", "\\", "\x00", "\ud800", "😀", "１", "٣", "−", "\u2028", "½", " or ", r"\text{ and }",
]  # fmt: skip
OPERATORS = ["+", "-", "*", "/", "^", r"\cdot ", r"\times ", r"\div ", "=", ",", ""]
BOMBS = [
    "9^{9^{9^9}}", "2^{2^{2^{2^{2^2}}}}", r"\sqrt{" * 300 + "2" + "}" * 300, "(" * 400 + "x" + ")" * 400,
    r"\frac{1}{" * 200 + "2" + "}" * 200, "(x+1)^{10000}", "(x+y+z)^{200}", "10^{1000000}", "1" * 3999, "x" * 3999, "1e999999999",
    r"\sum_{n=1}^{10^{10}} n", "1000000000!", "((1000!)!)!", r"\int_0^1 \int_0^1 \int_0^1 x^{x^{x}} dx dy dz", r"\prod_{n=1}^{1000000}n",
    "x^" * 500 + "x", "{" * 3000, "}" * 3000, r"\boxed{" * 400, r"\left(" * 300, "2^{-1000000000}", "0." + "0" * 900 + "1",
    r"\sqrt[1000000000]{2}", r"\log_{2}(" * 100 + "2" + ")" * 100, "-" * 900 + "x", r"\pm" * 50 + "1",
    ",".join(f"x_{{{i}}}" for i in range(200)), r"\cup".join(f"({i},{i + 1})" for i in range(100)), "x=" * 300 + "1", "1/" * 400 + "3",
]  # fmt: skip
FRAMES = ["so \\boxed{%s}", "\\boxed{%s", "%s", "\\boxed{%s}}", "\\boxed {%s} \\boxed{%s}", "$\\boxed{%s}$."]  # fmt: skip
ANSWERS = [*ATOMS[:8], "12", "7/3", "(1,2)", "yes", "B"]


def expression(rng: random.Random, depth: int = 0) -> str:
    kind = rng.random()
    if depth > 3 or kind < 0.4:
        return rng.choice(ATOMS)
    inner = lambda: expression(rng, depth + 1)
    if kind < 0.7:
        return inner() + rng.choice(OPERATORS) + inner()
    if kind < 0.85:
        return rng.choice(["{%s}", "(%s)", r"\{%s\}"]) % inner()
    if kind < 0.9:
        return rf"\frac{{{inner()}}}{{{inner()}}}"
    if kind < 0.95:
        return rf"\sqrt{{{inner()}}}"
    return "".join(chr(rng.randrange(32, 127)) for _ in range(rng.randint(0, 12)))


def case(rng: random.Random) -> str:
    is_bomb = rng.random() < 0.001
    answer = rng.choice(ANSWERS) if rng.random() < 0.8 else expression(rng)
    body = rng.choice(BOMBS) if is_bomb else expression(rng)
    if is_bomb:
        answer = rng.choice([r"2\sqrt{3}", "x+1", r"\pi"])
    verdict = judge(rng.choice(FRAMES).replace("%s", body), answer)
    assert verdict.reason in get_args(Reason)
    assert verdict.correct == (verdict.reason == "equal")
    return verdict.reason


@pytest.mark.parametrize(
    "number", [1000, pytest.param(50_000, marks=pytest.mark.faults)], ids="{:,} answers".format
)
def test_random_answers(number: int) -> None:
    counts = fuzz("answers", number, case)
    assert counts["equal"] and counts["different"] and counts["not a number"]
