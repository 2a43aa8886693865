r"""Comparison of two LaTeX expressions: math-verify's rules, with an exact test where math-verify rounds.

math-verify parses (latex2sympy) and compares sets, tuples, intervals, matrices and equations. At their leaves it
subtracts with 15 digits and treats a difference below 1e-15 as zero, so that 1/7^30 and 6^30/7^30 count as equal.
Here `is_zero` compares the leaves: exactly if both are rational, otherwise with enough digits to distinguish any two
numbers of their size. Only a decimal compared with an irrational number is rounded, as in math-verify, to six digits.
This module runs only in the worker process (`worker.py`), which may be killed.
"""

import re
from functools import lru_cache
from typing import Any

from antlr4.atn.PredictionMode import PredictionMode
from latex2sympy2_extended import latex2sympy2
from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy
from latex2sympy2_extended.logic import And
from latex2sympy2_extended.math_normalization import NormalizationConfig
from latex2sympy2_extended.sets import FiniteSet
from math_verify import LatexExtractionConfig, grader
from math_verify import parse as parse_latex
from math_verify import verify as verify_parsed
from sympy import (
    Basic,
    Eq,
    Expr,
    Float,
    I,
    MatrixBase,
    Mul,
    Number,
    Pow,
    Rational,
    Symbol,
    UnevaluatedExpr,
    exp,
    log,
    nan,
    oo,
    zoo,
)
from sympy.concrete.expr_with_limits import ExprWithLimits
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from sympy.functions.elementary.hyperbolic import HyperbolicFunction

# Units are handled in `units.py`: math-verify treats any text in \text{..} as a unit.
_LATEX = LatexExtractionConfig(
    boxed_match_priority=0,
    normalization_config=NormalizationConfig(
        basic_latex=True,
        units=False,
        malformed_operators=True,
        nits=True,
        boxed="all",
        equations=False,
    ),
)
_FONT = re.compile(r"\\(?:boldsymbol|mathbf|mathit|mathsf|bm|pmb)(?![A-Za-z])\s*(?=\{)")
_UPRIGHT = re.compile(r"\\(?:mathrm|text|textrm|textit|operatorname|rm)\s*\{\s*(\\?[A-Za-z]+)\s*\}")
_FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan arccot sinh cosh tanh coth ln log exp max min gcd lcm det".split()
)
_BASE = re.compile(r"(?<![\w{\\])([0-9][0-9A-F]*)_\{?([0-9]+)\}?")
_LIST = re.compile(
    r"\s*(?:[,;]\s*(?:\\(?:text|mbox)\s*\{\s*(?:and|or)\s*\}|(?:and|or)(?![A-Za-z]))?|\\(?:text|mbox)\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))\s*"
)
_MAX_PARTS = 64
_BASE_DIGITS = 60
_MAX_DIGITS = 200_000


def warm_up() -> None:
    """Load the parts of parser and sympy that they load lazily."""
    for answer, response in (
        (r"2\sqrt{3}", r"\sqrt{12}"), ("y=2x+3", "2x-y+3=0"), (r"[0,\infty)", r"x \ge 0"), ("1<x<2", "(1,2)"),
        (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty)\cup(-\infty,2)"), (r"\{1,\pi\}", r"\pi,1"), ("(x-1)(x+1)", "x^2-1"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\3\end{pmatrix}"), (r"\arctan 2", r"\ln 2"),
    ):  # fmt: skip
        are_equal(response, answer)


def are_equal(response: str, answer: str) -> bool | None:
    """Return True if two expressions have the same meaning, and None if one cannot be parsed."""
    answers, responses = split_list(answer), split_list(response)
    if len(answers) > 1 and len(answers) == len(responses) and _match(responses, answers):
        return True
    if (wanted := _tuple_parts(answer)) and (given := _tuple_parts(response)):
        if wanted[0] == given[0] and len(wanted[1]) == len(given[1]):
            if all(_match([x], [y]) for x, y in zip(given[1], wanted[1], strict=True)):
                return True
    expected, got = parse(answer), parse(response)
    if expected is None or got is None:
        return None
    return _mean_the_same(expected, got)


def split_list(text: str) -> list[str]:
    r"""Return the parts of a bare list or of a set in braces; a part with `\pm` becomes two."""
    inner = text.strip()
    if inner.startswith(r"\{") and inner.endswith(r"\}") and inner.count(r"\{") == 1:
        inner = inner[2:-2]
    parts, depth, start = [], 0, 0
    for mark in re.compile(r"[({\[]|[)}\]]|" + _LIST.pattern).finditer(inner):
        if mark[0] in "({[":
            depth += 1
        elif mark[0] in ")}]":
            depth -= 1
        elif depth == 0:
            parts.append(inner[start : mark.start()])
            start = mark.end()
    parts.append(inner[start:])
    return [signed for part in parts if part.strip() for signed in _both_signs(part.strip())]


def _tuple_parts(text: str) -> tuple[str, list[str]] | None:
    """Return the brackets and parts of a tuple or interval; math-verify reads only parts that an interval can have."""
    text = text.strip()
    if text[:1] not in ("(", "[") or text[-1:] not in (")", "]"):
        return None
    parts = split_list(text[1:-1])
    is_one = len(parts) > 1 and all(part.count("(") == part.count(")") for part in parts)
    return (text[0] + text[-1], parts) if is_one else None


def _both_signs(text: str) -> list[str]:
    r"""Return the upper and lower readings of `\pm` and `\mp`. A tuple stays, because its signs may be independent."""
    if r"\pm" not in text and r"\mp" not in text or re.search(r"\([^()]*,", text):
        return [text]
    upper = re.sub(r"\\mp(?![A-Za-z])\s*", "-", re.sub(r"\\pm(?![A-Za-z])\s*", "+", text))
    lower = re.sub(r"\\mp(?![A-Za-z])\s*", "+", re.sub(r"\\pm(?![A-Za-z])\s*", "-", text))
    return [re.sub(r"^\+|(?<=[{(])\+", "", signed) for signed in (upper, lower)]


def _match(responses: list[str], answers: list[str]) -> bool:
    """Return True if the responses match the answers one to one, in any order."""
    if len(answers) > _MAX_PARTS:
        return False
    expected = [parse(text) for text in answers]
    for response in responses:
        got = parse(response)
        if got is None:
            return False
        place = next(
            (i for i, e in enumerate(expected) if e is not None and _mean_the_same(e, got)), None
        )
        if place is None:
            return False
        del expected[place]
    return True


@lru_cache(maxsize=1024)  # a group of rollouts shares its reference
def parse(text: str) -> Basic | MatrixBase | None:
    """Return the expression of `text`, with its decimals unchanged; None if math-verify cannot parse it."""
    found = parse_latex(
        f"${_prepared(text)}$", [_LATEX], fallback_mode="no_fallback", parsing_timeout=0
    )
    return (
        _with_real_symbols(found[0]) if found and isinstance(found[0], Basic | MatrixBase) else None
    )


def _prepared(text: str) -> str:
    text = _UPRIGHT.sub(_upright, _FONT.sub("", text))
    return _BASE.sub(r"\\beta_{\1b\2}", text)


def _upright(match: re.Match[str]) -> str:
    r"""Return e for `\mathrm{e}` and \arctan for `\operatorname{arctan}`; keep other words."""
    word = match[1]
    if word in _FUNCTIONS:
        return rf"\{word} "
    return f" {word} " if len(word) == 1 or word.startswith("\\") else match[0]


def _with_real_symbols(expression: Any) -> Any:
    """Make symbols real and i the imaginary unit.

    math-verify makes the symbols of each side real if that side has no `i`, so the two sides could differ.
    """
    if isinstance(expression, And | FiniteSet):
        return type(expression)(*(_with_real_symbols(part) for part in _as_written(expression)))
    if isinstance(expression, Relational):
        sides = (_with_real_symbols(side) for side in (expression.lhs, expression.rhs))
        return expression.func(*sides, evaluate=False)
    has_index = expression.has(ExprWithLimits)
    symbols = {
        symbol: I if symbol.name == "i" and not has_index else Symbol(symbol.name, real=True)
        for symbol in expression.free_symbols
        if type(symbol) is Symbol and (symbol.name == "i" or not symbol.is_real)
    }
    return expression.xreplace(symbols) if symbols else expression


def _as_written(expression: Any) -> list[Any]:
    """Return the parts of latex2sympy's And or FiniteSet in the order of the text."""
    return list(expression._unsorted_args)


def _mean_the_same(expected: Basic | MatrixBase, got: Basic | MatrixBase) -> bool:
    """Return math-verify's verdict; an equation counts as an answer only if it is true or names its right side."""
    if isinstance(got, Eq | And) and not isinstance(expected, Relational | And):
        sides = _sides(got)
        for left, right in zip(sides, sides[1:], strict=False):
            if left.atoms(Number) - {Number(-1), Number(1)} or not left.free_symbols:
                if not _leaves_equal(left, right):
                    return False
    return verify_parsed(expected, got, allow_set_relation_comp=True, timeout_seconds=0)


def _sides(equation: Any) -> list[Expr]:
    parts = _as_written(equation) if isinstance(equation, And) else [equation]
    if not all(isinstance(part, Eq) for part in parts):
        return []
    return [parts[0].lhs, *(part.rhs for part in parts)]


def _leaves_equal(a: Any, b: Any, *_: int) -> bool:
    """Compare two matrices, numbers or formulas exactly, in place of math-verify's numeric and symbolic tests."""
    if isinstance(a, MatrixBase) or isinstance(b, MatrixBase):
        return (
            isinstance(a, MatrixBase)
            and isinstance(b, MatrixBase)
            and a.shape == b.shape
            and all(_leaves_equal(x, y) for x, y in zip(a.flat(), b.flat(), strict=True))
        )
    if not isinstance(a, Expr) or not isinstance(b, Expr):
        return False
    if _percentage(a) is not None or _percentage(b) is not None:  # 50 % equals 1/2, and also 50
        p, q = _percentage(a), _percentage(b)
        same_number = _leaves_equal(a if p is None else p, b if q is None else q)
        return same_number or _leaves_equal(a.doit(), b.doit())
    x, y = _exact(a), _exact(b)
    if {_is_decimal(a), _is_decimal(b)} == {True, False} and not (x.is_Rational and y.is_Rational):
        return x.is_number and y.is_number and _round_alike(x, y)
    return is_zero(x - y)


def _percentage(expression: Expr) -> Expr | None:
    """Return p of p %, which is parsed as p times an unevaluated 1/100."""
    hundredth = UnevaluatedExpr(Rational(1, 100))
    if (
        isinstance(expression, Mul)
        and len(expression.args) == 2
        and expression.args[1] == hundredth
    ):
        return expression.args[0]
    return None


def _is_decimal(expression: Expr) -> bool:
    return isinstance(expression, Float) or (
        isinstance(expression, Mul)
        and len(expression.args) == 2
        and expression.args[0] == -1
        and isinstance(expression.args[1], Float)
    )


def _exact(expression: Expr) -> Expr:
    """Evaluate `expression` with its decimals as exact fractions."""
    decimals = {number: Rational(str(number)) for number in expression.atoms(Float)}
    return (expression.xreplace(decimals) if decimals else expression).doit()


def _round_alike(a: Expr, b: Expr) -> bool:
    """Return True if two numbers agree in six decimals and in five significant digits."""
    size = max(abs(a.evalf(30)), abs(b.evalf(30)))
    return a.evalf(30).round(6) == b.evalf(30).round(6) and bool(
        abs((a - b).evalf(30)) <= size / 10**5
    )


def is_zero(difference: Any) -> bool:
    """Return True if an expression without decimals is zero, at three points if it has variables.

    Rational values are exact. Any other value is computed with more digits than two different numbers of such parts
    can share, so that even the smallest difference counts.
    """
    if difference.is_Rational:
        return difference == 0
    if difference in (nan, zoo, oo, -oo):
        return False
    difference = difference.replace(
        lambda part: isinstance(part, AppliedUndef), lambda part: Symbol(str(part), real=True)
    )
    symbols = sorted(difference.free_symbols, key=str)
    if not symbols:
        return _is_zero_number(difference)
    tested = False
    for shift, sign in ((0, 1), (7, -1), (13, 1)):
        values = {
            symbol: Rational(
                sign * (1_000_003 + 7919 * (place + shift)), 10_007 + 65_537 * place + 101 * shift
            )
            for place, symbol in enumerate(symbols)
        }
        value = difference.xreplace(values).doit()
        if value.has(nan, zoo, oo):
            continue
        tested = True
        if not (value == 0 if value.is_Rational else _is_zero_number(value)):
            return False
    return tested


def _is_zero_number(number: Any) -> bool:
    if number.is_Rational:
        return number == 0
    if number.has(HyperbolicFunction):
        number = number.rewrite(exp)
    for digits in (_BASE_DIGITS, _separating_digits(number)):
        parts = number.evalf(2, maxn=digits).as_real_imag()
        # sympy marks a value without a certain digit by a precision of one bit.
        if any(isinstance(part, Float) and part._prec > 1 and part != 0 for part in parts):
            return False
        if not all(isinstance(part, Number) for part in parts):
            return False
    return True


def _separating_digits(number: Expr) -> int:
    """Return a generous bound on the digits that two different numbers made of the parts of `number` can share."""
    digits = 1000
    for part in number.atoms(Rational, Pow, exp, log):
        if isinstance(part, Rational):
            digits += 3 * (int(part.p).bit_length() + int(part.q).bit_length())
        elif part.is_number:
            size = abs(part.evalf(5))
            digits += 4 * int(abs(log(size, 10).evalf(5))) if size.is_positive else 0
    return min(digits, _MAX_DIGITS)


grader.sympy_numeric_eq = _leaves_equal
grader.sympy_symbolic_eq = lambda a, b: False


class _TwoStages(_Latex2Sympy):
    """latex2sympy with ANTLR's two-stage parsing, twice as fast.

    SLL prediction keeps what it learns from each text. Where it succeeds the tree is that of full LL prediction; a syntax
    error may be SLL's own, so that the text is parsed again (Parr et al., Adaptive LL(*) Parsing, OOPSLA 2014, 3.2).
    """

    mode = PredictionMode.SLL

    def create_parser(self, latex_str: str) -> Any:
        parser = super().create_parser(latex_str)
        parser._interp.predictionMode = self.mode
        return parser

    def parse(self, latex_str: str) -> Any:
        try:
            return super().parse(latex_str)
        except Exception:  # latex2sympy raises this class for a syntax error
            self.mode = PredictionMode.LL
            return super().parse(latex_str)


latex2sympy2._Latex2Sympy = _TwoStages
