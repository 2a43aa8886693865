r"""Exact comparison of expressions, which accepts all right answers that math-verify accepts."""

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("math_verify")
from math_verify import parse, verify
from sympy import Rational, Symbol, atan, cos, exp, log, pi, sqrt, tanh

from phimini.stages.verify.expressions import is_zero, split_list
from phimini.stages.verify.verdict import judge

x = Symbol("x", real=True)
ZERO = {
    "nested roots": sqrt(3 + 2 * sqrt(2)) - 1 - sqrt(2),
    "arcs": atan(2) + atan(3) - 3 * pi / 4,
    "cosines": cos(pi / 9) * cos(2 * pi / 9) * cos(4 * pi / 9) - Rational(1, 8),
    "logarithms": log(12) - log(3) - 2 * log(2),
    "polynomial": (x + 1) ** 3 - x**3 - 3 * x**2 - 3 * x - 1,
    "quotient": (x**2 - 1) / (x - 1) - x - 1,
}
NOT_ZERO = {
    "tiny": Rational(1, 2**1000),
    "tiny beside a root": sqrt(2 + Rational(1, 10**60)) - sqrt(2),
    "a tiny of 5,000 digits beside a root": sqrt(2 + Rational(1, 10**5000)) - sqrt(2),
    "tanh": tanh(1000) - 1,
    "Ramanujan": exp(pi * sqrt(163)) - 640320**3 - 744,
    "tiny coefficient": x / 2**100,
    "tiny imaginary part": sqrt(-1) / 10**40 * sqrt(2),
    "absolute value": abs(x) - x,
    "higher power": x**2 - x,
}


@pytest.mark.parametrize("case", ZERO)
def test_zero_is_found(case: str) -> None:
    assert is_zero(ZERO[case])


@pytest.mark.parametrize("case", NOT_ZERO)
def test_nothing_is_too_small_to_count(case: str) -> None:
    assert not is_zero(NOT_ZERO[case])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("1, 2", ["1", "2"]), ("(1,2), (3,4)", ["(1,2)", "(3,4)"]), (r"\{a,b\}", ["a", "b"]), ("a, b, and c", ["a", "b", "c"]),
        (r"a \text{ or } b", ["a", "b"]), (r"\pm\sqrt2", [r"\sqrt2", r"-\sqrt2"]), (r"1\pm a, b", ["1+a", "1-a", "b"]),
        (r"\frac{1\pm a}{1\mp a}", [r"\frac{1+a}{1-a}", r"\frac{1-a}{1+a}"]), (r"(\pm 1, 2)", [r"(\pm 1, 2)"]),
        (r"f(a,b)", ["f(a,b)"]), ("x_{1,2}", ["x_{1,2}"]), ("", []),
    ],
)  # fmt: skip
def test_a_list_is_split_at_its_top(text: str, parts: list[str]) -> None:
    assert split_list(text) == parts


# Each atom in several spellings; two of one line are equal, of two lines different.
ATOMS = [
    [r"\sqrt{2}", r"\sqrt 2", r"\frac{2}{\sqrt{2}}", r"\sqrt{\frac{8}{4}}"],
    [r"\pi", r"{\pi}", r"\mathrm{\pi}"],
    [r"\frac{\sqrt{3}}{2}", r"\sqrt{3}/2", r"\dfrac{\sqrt3}{2}", r"\frac12\sqrt3"],
    ["1-e", r"1-\mathrm{e}", "-e+1"],
    ["2+3i", r"2+3\mathrm{i}", "3i+2", "2.0+3.0i"],
    ["x^2-1", "(x-1)(x+1)", "-1+x^2"],
    [r"\frac{\sqrt{5}}{2^{70}}", r"2^{-70}\sqrt{5}"],
    [r"\frac{\sqrt{5}}{2^{71}}", r"2^{-71}\sqrt{5}"],
    ["7", "7.0", r"\text{7}"],
]
FRAMES = {
    "alone": "{}", "name": "t={}", "pair": "({}, z)", "pair 2": "(z,{})", "set": r"\{{ {} , z^3 \}}", "list": "{}, z^3",
    "list 2": r"{}\text{{ and }}z^3", "matrix": r"\begin{{pmatrix}} {} \\ 1 \end{{pmatrix}}", "closed": r"[{},\infty)",
    "union": r"(-\infty,-9)\cup({},\infty)", "line": "y=z+{}", "at least": r"t\ge {}",
}  # fmt: skip
COMPLEX = ("2+3i", "x^2-1")
OUR_RULES = ("work left undone", "not in lowest terms", "not a number")


def math_verify_says(response: str, answer: str) -> bool:
    expected, got = (parse(f"${text}$", parsing_timeout=0) for text in (answer, response))
    return verify(expected, got, timeout_seconds=0)


spellings = st.sampled_from([(k, text) for k, texts in enumerate(ATOMS) for text in texts])


@given(frame=st.sampled_from(list(FRAMES)), got=spellings, expected=spellings)
@settings(deadline=None, max_examples=150)
def test_never_worse_than_math_verify_and_exact(
    frame: str, got: tuple[int, str], expected: tuple[int, str]
) -> None:
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    unordered = {ATOMS[k][0] for k, _ in (got, expected)} & set(COMPLEX)
    if frame in ("closed", "union", "at least") and unordered:
        return  # no interval has such an end
    response, answer = FRAMES[frame].format(got[1]), FRAMES[frame].format(expected[1])
    verdict = judge(rf"\boxed{{{response}}}", answer)
    if got[0] != expected[0]:
        assert not verdict, f"{response} is not {answer}"
    elif math_verify_says(response, answer):
        assert verdict or verdict.reason in OUR_RULES, (
            f"math-verify: {response} is {answer}; here: {verdict.reason}"
        )


@pytest.mark.parametrize("frame", [frame for frame in FRAMES if frame != "name"])
def test_every_spelling_is_equal_in_every_frame(frame: str) -> None:
    for texts in ATOMS:
        if frame in ("closed", "union", "at least") and texts[0] in COMPLEX or texts[0] == "7":
            continue
        answer = FRAMES[frame].format(texts[0])
        for text in texts:
            verdict = judge(rf"\boxed{{{FRAMES[frame].format(text)}}}", answer)
            assert verdict, (FRAMES[frame].format(text), answer, verdict.reason)
