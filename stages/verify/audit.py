r"""Second check of verdicts: an own reading of response and answer, an own parser, and sympy's comparison.

It shares no code with the verdict that it audits and does not use math-verify. It is undecided where it cannot read a side
(matrices, inequalities, equations, unions), and where both sides have one value but the response does not write it as a
result: `6*7` and `2/4` are a matter of rules. This module runs only in a worker process (`worker.py`), with its time limit.
"""

import contextlib
import re
import unicodedata
from dataclasses import dataclass

import sympy
from sympy import Expr, Rational

from phimini.stages.verify.audit_parser import Parser, Unreadable

_CHARACTERS = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "±": r"\pm ", "π": r"\pi ", "∞": r"\infty ",
    "√": r"\sqrt ", "°": r"^\circ ", "²": "^2", "³": "^3", "∕": "/", "⁄": "/",
}  # fmt: skip
_IGNORED = re.compile(
    r"\\(?:left|right|big|Big|displaystyle|limits)(?![A-Za-z])|\\[!,;: ]|~|\$|\\[()\[\]]|\\(?:quad|qquad)(?![A-Za-z])"
)
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|boldsymbol|boxed)\s*\{([^{}]*)\}")  # fmt: skip
_SPACE = re.compile(r"(?<![0-9])\s+|\s+(?![0-9])")
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?")
_UNIT = re.compile(r"(?<=[0-9)}\s])\s*(?:\\text|\\mathrm|\\mbox|\\textrm)\s*\{\s*([gsmhlLNJWVK]|[A-Za-z][A-Za-z /.]+)\s*\}(?:\s*\^\s*\{?[23]\}?)?\s*$|(?<=[0-9])\s+([A-Za-z]{2,}[A-Za-z ]*)$")  # fmt: skip
_NAME = re.compile(r"\s*\\?[A-Za-z]+(?:_(?:[A-Za-z0-9]|\{[A-Za-z0-9]+\}))?(?:\([A-Za-z0-9]+\))?\s*")
_AND = re.compile(r"(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])")
_WORD = re.compile(r"\(?\s*([A-Za-z][A-Za-z -]*)\s*\)?")


@dataclass
class _Value:
    """The reading of one side."""

    brackets: str
    """of a tuple or interval; "{}" of a set or a bare list, "" of a single expression"""
    parts: list["_Parsed"]
    unit: str = ""
    name: str = ""
    word: str = ""
    """of an answer in words; then there are no parts"""


@dataclass
class _Parsed:
    value: Expr
    is_undone: bool
    """numbers are left to be added, multiplied or cancelled"""
    is_decimal: bool


def warm_up() -> None:
    """Load the parts of sympy that it loads lazily."""
    for response, answer in ((r"\boxed{\sqrt{12}}", r"2\sqrt{3}"), (r"\boxed{(x-1)(x+1)}", "x^2-1"), (r"\boxed{7}", "8")):  # fmt: skip
        are_equal(response, answer)


def are_equal(response: str, answer: str) -> bool | None:
    """Return True if the response's last box, after its thoughts, holds the answer; None if undecided."""
    content = _boxed(response)
    if not content:
        return False
    if _SPACE.sub("", content) == _SPACE.sub("", answer):
        return True
    try:
        return _same(_read(content), _read(answer))
    except Unreadable:
        return None


def _boxed(response: str) -> str | None:
    """Return the content of the last box that is in no other box; None without a closed one."""
    text = response.rpartition("</think>")[2].partition("<think>")[0]
    place, found = text.find(r"\boxed"), None
    while place >= 0:
        start = place + len(r"\boxed")
        end = start
        rest = text[start:].lstrip()
        if rest.startswith("{"):
            start = text.index("{", start) + 1
            end = _closing(text, start)
            found = None if end < 0 else text[start:end].strip()
            end = max(end, start)
        elif bare := re.match(r"[-+−]?[0-9０-９½¼¾.,/／]*[0-9０-９½¼¾]|[A-Z](?![A-Za-z])", rest):
            found = bare[0]
        place = text.find(r"\boxed", end)
    return found


def _closing(text: str, start: int) -> int:
    depth, place = 1, start
    while place < len(text):
        if text[place] == "\\":
            place += 1
        elif text[place] in "{}":
            depth += 1 if text[place] == "{" else -1
            if not depth:
                return place
        place += 1
    return -1


def _read(text: str) -> _Value:
    """Return the reading of an answer. Raises Unreadable."""
    text = _plain(text)
    unit = ""
    if re.search(
        r"<|>|\\(?:le|ge|ne|leq|geq|neq|cup|cap|begin|in|mid|leqslant|geqslant)(?![A-Za-z])", text
    ):
        raise Unreadable("a relation, a union or a matrix")
    if re.search(r"[0-9]e[-+]?[0-9]|million|billion|thousand|hundred|dozen|squared", text):
        raise Unreadable("a number with a multiplier")
    if text.count("=") > 1:
        raise Unreadable("several equations")
    name, equals, value = text.rpartition("=")
    if equals and not _NAME.fullmatch(name):
        raise Unreadable("an equation")
    value = value.strip()
    if found := re.search(r"\\?%\s*$|\\text\s*\{\s*percent\s*\}$|\s+percent$", value):
        value, unit = value[: found.start()].strip(), "%"
    elif value.startswith(("\\$", "$")) or (found := _UNIT.search(value)):
        unit = "$" if found is None else (found[1] or found[2] or "").strip()
        value = value.lstrip("\\$") if found is None else value[: found.start()]
    value = _unwrapped(value)
    if (
        (word := _WORD.fullmatch(value))
        and not _AND.search(value)
        and (len(word[1]) > 1 or value[:1] == "(" or not equals)
    ):
        return _Value("", [], word=" ".join(word[1].lower().split()))
    brackets, parts = _parts(value)
    return _Value(brackets, [_parsed(part) for part in parts], unit, re.sub(r"[\s{}\\]", "", name))


def _plain(text: str) -> str:
    """Return the text with plain characters, without commands that only set it."""
    plain = ""
    for character in text:
        if unicodedata.decomposition(character).startswith("<fraction>"):
            top, _, bottom = unicodedata.normalize("NFKC", character).partition("⁄")
            plain += rf"\frac{{{top}}}{{{bottom}}}"
        else:
            plain += _CHARACTERS.get(character) or unicodedata.normalize("NFKC", character)
    text = re.sub(
        r"^\s*\\?\$(?=-?[0-9.,]+$)", r"\\text{}", plain
    )  # a price: its sign is no unit to compare
    text = _DEGREES.sub(" ", re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)).replace(
        "{,}", ","
    )
    text = re.sub(r"\\[lr]brace(?![A-Za-z])", "", text.replace(r"\{", "⟨").replace(r"\}", "⟩"))
    return _IGNORED.sub(" ", text).strip().removesuffix(".").strip()


def _unwrapped(text: str) -> str:
    """Return the text without \\text and the like, and without braces around all of it."""
    while (plain := _WRAPPED.sub(r" \1 ", text)) != text:
        text = plain
    text = text.strip()
    while text.startswith("{") and _closing(text, 1) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def _parts(text: str) -> tuple[str, list[str]]:
    """Return the brackets and the parts of a list, an interval, a tuple or a set; one part without brackets otherwise."""
    if re.fullmatch(r"-?[1-9][0-9]{0,2}(,[0-9]{3})+(\.[0-9]*)?", text):
        return "", [text.replace(",", "")]
    brackets = ""
    if text[:1] == "⟨" and text[-1:] == "⟩":
        brackets, text = "{}", text[1:-1]
    elif text[:1] == "(" and text[-1:] == ")" and _AND.search(text):
        text = text[1:-1]
    elif text[:1] in ("(", "[") and text[-1:] in (")", "]"):
        with contextlib.suppress(Unreadable):  # `(x-1)(x+1)` is no tuple
            if len(_split(text[1:-1])) > 1:
                brackets, text = text[0] + text[-1], text[1:-1]
    parts = _split(text)
    if brackets not in ("", "{}"):
        return brackets, parts
    signed = [part.replace(r"\pm", sign, 1) for part in parts for sign in (("+", "-") if r"\pm" in part else ("",))]  # fmt: skip
    return "{}" if brackets or len(signed) > 1 else "", signed


def _split(text: str) -> list[str]:
    parts, depth = [""], 0
    for piece in re.split(rf"([](){{}}[,;]|{_AND.pattern})", text):
        depth += (piece in ("(", "[", "{")) - (piece in (")", "]", "}"))
        if depth < 0:
            raise Unreadable("brackets")
        if not depth and piece in (",", ";", "and", "or"):
            parts.append("")
        else:
            parts[-1] += piece
    return [part.strip() for part in parts if part.strip()]


def _same(got: _Value, expected: _Value) -> bool | None:
    """Compare two readings."""
    if got.word or expected.word:
        return got.word == expected.word
    if got.name and expected.name and got.name != expected.name:
        return None
    if got.unit and expected.unit and got.unit != expected.unit:
        return None
    if got.brackets != expected.brackets or len(got.parts) != len(expected.parts):
        return None if "" in (got.brackets, expected.brackets) and len(got.parts) == len(expected.parts) else False  # fmt: skip
    if got.brackets != "{}":
        verdicts = [_equal(a, b) for a, b in zip(got.parts, expected.parts, strict=True)]
    else:
        verdicts, left = [], list(expected.parts)
        for part in got.parts:
            found = [_equal(part, other) for other in left]
            verdicts.append(True if True in found else None if None in found else False)
            if True in found:
                del left[found.index(True)]
    if got.brackets == "" and verdicts == [False] and (got.unit == "%") != (expected.unit == "%"):
        a, b = got.parts[0], expected.parts[0]
        verdicts = [_equal(_hundredth(a), b) if got.unit == "%" else _equal(a, _hundredth(b))]
    return False if False in verdicts else None if None in verdicts else True


def _hundredth(side: _Parsed) -> _Parsed:
    return _Parsed(side.value / 100, side.is_undone, side.is_decimal)


def _equal(got: _Parsed, expected: _Parsed) -> bool | None:
    a, b = got.value, expected.value
    equal = a == b
    if not equal and not (a.is_Rational and b.is_Rational):
        if a in (sympy.oo, -sympy.oo) or b in (sympy.oo, -sympy.oo):
            return False
        equal = (a - b).equals(0)
        if equal is False and got.is_decimal != expected.is_decimal and a.is_number and b.is_number:
            is_close = abs((a - b).evalf(20)) < abs(b.evalf(20)) * Rational(1, 10**4)
            return None if is_close else False
    if equal and got.is_undone and not expected.is_undone:
        return None
    return equal


def _parsed(text: str) -> _Parsed:
    parser = Parser(text)
    value = parser.sum()
    if parser.tokens:
        raise Unreadable(f"{parser.tokens[-1]!r} in {text!r:.80}")
    return _Parsed(value, parser.is_undone, parser.is_decimal)
