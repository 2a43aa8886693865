r"""Parser of LaTeX expressions for the second check of verdicts (`audit.py`): recursive descent, sympy's values."""

import re
from dataclasses import dataclass, field
from math import gcd
from typing import Any

import sympy
from sympy import Expr, Integer, Rational, Symbol

_TOKEN = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]*)?|\.[0-9]+)|(?P<name>\\?[A-Za-z]+|\\.)|(?P<mark>[-+*/^!(){}\[\]|_])|\s+")  # fmt: skip
_FUNCTIONS = {name: getattr(sympy, name) for name in ("sin", "cos", "tan", "cot", "sec", "csc", "log", "exp")} | {
    "ln": sympy.log, "arcsin": sympy.asin, "arccos": sympy.acos, "arctan": sympy.atan,
}  # fmt: skip
_TIMES = (r"\cdot", r"\times", "*")


class Unreadable(ValueError):
    """A text that this parser cannot read."""


@dataclass
class Parser:
    """Recursive descent over the tokens of an expression."""

    text: str
    tokens: list[str] = field(init=False)
    """those that are left, the next one last"""
    is_undone: bool = False
    is_decimal: bool = False

    def __post_init__(self) -> None:
        tokens, place = [], 0
        while place < len(self.text):
            token = _TOKEN.match(self.text, place)
            if token is None:
                raise Unreadable(f"{self.text[place]!r} in {self.text!r:.80}")
            place = token.end()
            word = token[0]
            if token["name"] and not word.startswith("\\") and word not in _FUNCTIONS:
                tokens += word  # letters are factors
            elif word.strip():
                tokens.append(word)
        self.tokens = tokens[::-1]

    def next(self) -> str:
        return self.tokens[-1] if self.tokens else ""

    def take(self) -> str:
        if not self.tokens:
            raise Unreadable(f"the end of {self.text!r:.80}")
        return self.tokens.pop()

    def sum(self) -> Expr:
        total = self.signed()
        has_number = bool(total.is_Rational)
        while self.next() in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            other = self.product()
            self.is_undone |= has_number and bool(other.is_Rational)
            has_number |= bool(other.is_Rational)
            total = total + sign * other
        return total

    def signed(self) -> Expr:
        if self.next() in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            return sign * self.product()
        return self.product()

    def product(self) -> Expr:
        value = self.power()
        while (token := self.next()) and token not in ("+", "-", ")", "}", "]", "|"):
            if token in ("/", r"\div"):
                self.take()
                value = self.quotient(value, self.power())
                continue
            is_explicit = token in _TIMES
            if is_explicit:
                self.take()
            elif token[0].isdigit() or token == "!":
                raise Unreadable(f"{token!r} after a factor in {self.text!r:.80}")
            other = self.power()
            is_mixed = not is_explicit and token == r"\frac" and _are_numbers(value, other)
            if is_mixed and value.is_Integer and 0 < other < 1:
                value = value + other
            else:
                self.is_undone |= _are_numbers(value, other)
                value = value * other
        return value

    def quotient(self, top: Expr, bottom: Expr) -> Expr:
        if bottom == 0:
            raise Unreadable("a division by zero")
        if _are_numbers(top, bottom):
            are_integers = top.is_Integer and bottom.is_Integer
            self.is_undone |= not are_integers or gcd(int(top), int(bottom)) != 1 and top != 0
        return top / bottom

    def power(self) -> Expr:
        base = self.atom()
        while self.next() in ("^", "!"):
            if self.take() == "!":
                self.is_undone, base = True, sympy.factorial(base)
                continue
            exponent = self.argument()
            self.is_undone |= _are_numbers(base, exponent)
            base = base**exponent
        return base

    def argument(self) -> Expr:
        r"""Return a group in braces, or TeX's single digit or letter: `\frac12`."""
        token = self.next()
        if token == "{":
            return self.group("{", "}")
        if len(token) > 1 and token.isdigit():
            self.tokens[-1] = token[1:]
            return Integer(token[0])
        if token == "-":
            self.take()
            return -self.atom()
        return self.atom()

    def group(self, opening: str, closing: str) -> Expr:
        if self.take() != opening:
            raise Unreadable(f"no {opening!r} in {self.text!r:.80}")
        value = self.sum()
        if self.take() != closing:
            raise Unreadable(f"no {closing!r} in {self.text!r:.80}")
        return value

    def atom(self) -> Expr:
        token = self.next()
        if token in ("(", "{", "["):
            return self.group(token, {"(": ")", "{": "}", "[": "]"}[token])
        if token == "|":
            self.is_undone = True
            return sympy.Abs(self.group("|", "|"))
        self.take()
        if token[0].isdigit() or token[0] == ".":
            self.is_decimal |= "." in token.rstrip("0").rstrip(".")
            return Rational(token.rstrip(".") if token != "." else "0")
        name = token.removeprefix("\\")
        if name in _FUNCTIONS:
            return self.call(_FUNCTIONS[name])
        if token == r"\frac":
            top = self.argument()
            return self.quotient(top, self.argument())
        if token == r"\sqrt":
            return self.root()
        return self.constant(token)

    def call(self, function: Any) -> Expr:
        exponent = None
        if self.next() == "^":
            self.take()
            exponent = self.argument()
        value = function(self.power())
        return value if exponent is None else value**exponent

    def root(self) -> Expr:
        degree: Expr = Integer(2)
        if self.next() == "[":
            degree = self.group("[", "]")
        inner = self.argument() if self.next() == "{" else self.atom()
        value = inner ** (1 / degree)
        self.is_undone |= bool(value.is_Rational)
        return value

    def constant(self, token: str) -> Expr:
        known: dict[str, Expr] = {r"\pi": sympy.pi, "e": sympy.E, "i": sympy.I, r"\infty": sympy.oo}
        if token in known:
            return known[token]
        if not re.fullmatch(r"[A-Za-z]|\\(?:alpha|beta|gamma|theta|lambda|mu|phi|omega|sigma)", token):  # fmt: skip
            raise Unreadable(f"{token!r} in {self.text!r:.80}")
        name = token
        if self.next() == "_":
            self.take()
            name += f"_{self.take()}"
        return Symbol(name, real=True)


def _are_numbers(a: Expr, b: Expr) -> bool:
    return bool(a.is_Rational and b.is_Rational)
