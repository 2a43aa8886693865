r"""Normalisation of an answer's text, and its split into value, name and unit.

`$x = 42\text{ cm}$` has the value `42`, the name `x` and the unit `cm`. Names and units are compared separately: `x=3`
equals 3 but not `y=3`.
"""

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

from phimini.stages.verify.units import split_currency, split_unit

_MAX_WRAPPERS = 8
_PLAIN = re.compile(r"[-+]?(?:[0-9]+(?:[./][0-9]+|(?:,[0-9]+)+)?|\\frac\{[0-9]+\}\{[0-9]+\})")
_WRAPPER = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|boldsymbol|bm|mbox|boxed|fbox)\s*\{"
)
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
AND = re.compile(
    r"\s*,?\s*(?:\\(?:text|mbox|mathrm)\s*\{\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))\s*"
)
_OR = re.compile(r"\\(?:text|mbox|mathrm)\s*\{\s*or\s*\}|(?<![A-Za-z\\])or(?![A-Za-z])")
_CHOICE = re.compile(r"\([A-Za-z]\)")
_DOLLAR = re.compile(r"(?<!\\)\$")

_SYNONYMS = {
    "dfrac": r"\frac", "tfrac": r"\frac", "cfrac": r"\frac", "leq": r"\le", "leqslant": r"\le", "geq": r"\ge",
    "geqslant": r"\ge", "neq": r"\ne", "lt": "<", "gt": ">", "mid": "|", "vert": "|", "lvert": "|", "rvert": "|",
    "lbrace": r"\{", "rbrace": r"\}", "infin": r"\infty", "varnothing": r"\emptyset",
}  # fmt: skip
_SPELLING = re.compile(
    r"(?P<space>(?:(?<!\\)\\(?:q?quad(?![A-Za-z])|\s)|~|\s)+)|(?<!\\)\\(?:[!;:]|(?P<synonym>"
    + "|".join(_SYNONYMS)
    + r")(?![A-Za-z])|(?:left|right|middle|displaystyle|textstyle|limits|bigl|bigr|big|Bigl|Bigr|Big)(?![A-Za-z]))"
)
_UNICODE = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "±": r"\pm ", "∓": r"\mp ",
    "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ",
    "∈": r"\in ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ",
    "β": r"\beta ", "λ": r"\lambda ", "⁄": "/", "∕": "/", "∶": ":", "ⅈ": "i", "ⅇ": "e", "²": "^2", "³": "^3", "¹": "^1",
}  # fmt: skip
_ROOT = re.compile(r"√\s*(\([^()]*\)|\{[^{}]*\}|[0-9]+|[A-Za-z])")

_ARGUMENT = r"\([^()=<>]*\)"
_SUBSCRIPT = r"(?:_(?:[A-Za-z0-9]|\\[A-Za-z]+|\{[^{}=<>]*\}))"
_SYMBOL = rf"(?:[A-Za-z]|\\(?!in\b|le\b|ge\b|ne\b|pm\b|mp\b|cup\b|cap\b|frac\b|sqrt\b|pi\b|text|math|infty\b)[A-Za-z]+)'*{_SUBSCRIPT}?'*"
SIMPLE_NAME = re.compile(
    rf"\s*(?:{_SYMBOL}\s*(?:{_ARGUMENT})?|\({_SYMBOL}(?:\s*,\s*{_SYMBOL})+\))\s*"
)
EQUALS = re.compile(r"(?<![<>!=\\])=(?!=)|\\in(?=\s*[\[(\\{])")
# Digits in a subscript, an exponent or an argument are part of a name; those of `2x` and `6*7` are an operation.
_NUMBER_IN_NAME = re.compile(r"(?<![A-Za-z0-9_^])[0-9]")
_SCRIPT = re.compile(r"[_^]\s*(?:\{[^{}]*\}|[A-Za-z0-9])|(?<=[A-Za-z}])\s*\([^()]*\)")
_ARGUMENTS = re.compile(r"_\s*(?:\{[^{}]*\}|[A-Za-z0-9])|(?<=[A-Za-z}])\s*\([^()]*\)")
_UNDERLINED_NUMBER = re.compile(r"[0-9]\s*[_^]")

RELATION = re.compile(r"\s*(<|>|\\le(?![A-Za-z])|\\ge(?![A-Za-z])|\\ne(?![A-Za-z]))\s*")

VARIABLE = re.compile(
    r"(?<![A-Za-z\\])(?![eidI])[A-Za-z](?![A-Za-z])|\\(?!pi)(?:[a-z]*(?:eta|mu|alpha|amma|ambda|igma|rho|phi|psi|omega|tau))(?![a-z])"
)

# `x+y=3` is a line; `AB`, `f(2)`, `m/n`, `\angle A` and `m_{\max}` are names of a quantity.
_OPERATOR = re.compile(r"[-+^]|\\(?:sqrt|pm)(?![A-Za-z])")


@dataclass(frozen=True, slots=True)
class Answer:
    """The parts of an answer. `text` lacks only units; `value` is `text` without its name."""

    text: str
    value: str
    name: str | None = None
    """the normalised text before `=`"""
    unit: str | None = None
    """None without a unit, '' for a counted thing"""

    @property
    def has_plain_name(self) -> bool:
        """True if the name is a variable, a function's value or a tuple of variables, not an expression such as x+y."""
        return self.name is not None and not _OPERATOR.search(_ARGUMENTS.sub("", self.name))


def read_answer(text: str) -> Answer:
    """Parse `text` into an answer, normalised for comparison with other answers."""
    text = text.strip()
    if _PLAIN.fullmatch(text):
        return Answer(text, text)
    text = spelled(text)
    name: str | None = None
    unit: str | None = None
    whole: str | None = None
    for _ in range(_MAX_WRAPPERS):
        before = text
        text = _unwrapped(text)
        text = text[:-1].rstrip() if text.endswith(".") and len(text) > 1 else text
        text, found = split_unit(text)
        unit = found if unit is None else unit
        text, found = split_currency(text)
        unit = found if unit is None else unit
        text = trimmed(text)
        if "=" in text or r"\in" in text:
            value, found = split_name(text)
            whole = text if whole is None and found else whole
            text, name = value, found if name is None else name
        if text == before or _PLAIN.fullmatch(text):
            break
    return Answer(text if whole is None else whole, text, name, unit)


def spelled(text: str) -> str:
    r"""Normalise the characters and commands of `text`: `\dfrac`, `\left`, `≤`, full-width digits, spaces."""
    if not text.isascii():
        text = _ascii(text)
    text = _SPELLING.sub(_spelling, text)
    return trimmed(re.sub(r" {2,}", " ", text) if "  " in text else text)


def _spelling(match: re.Match[str]) -> str:
    return " " if match["space"] else _SYNONYMS.get(match["synonym"] or "", "")


def trimmed(text: str) -> str:
    r"""Strip white space and `\,` from both ends of `text`."""
    text = text.strip()
    while text.startswith(r"\,"):
        text = text[2:].lstrip()
    while text.endswith(r"\,"):
        text = text[:-2].rstrip()
    return text


def split_name(text: str) -> tuple[str, str | None]:
    """Split `text` into the value and the name before `=`.

    In `x = 1, x = 2` each `x =` is removed, also within set braces. `b = 3, a = 2` has the name (a,b) and the value (2,3).
    Other texts with several different names have none.
    """
    if (assigned := _assigned(text)) is not None:
        return assigned
    if text.startswith(r"\{") and text.endswith(r"\}") and "|" not in text and ":" not in text:
        value, name = split_name(text[2:-2].strip())
        return (text, None) if name is None else (rf"\{{{value}\}}", name)
    equals = EQUALS.search(text)
    if equals is None:
        return text, None
    left, value = text[: equals.start()].strip(), text[equals.end() :].strip()
    name = _name(left)
    if not value or name is None:
        return text, None
    if "=" not in value:
        return value, name
    again = rf"(?<=[,}}\s]){re.escape(left)}\s*=(?!=)\s*"
    value = re.sub(again, "", value)
    if re.search(r"[,;]|\\text|\b(?:and|or)\b", value[: max(value.rfind("="), 0)]):
        return text, None
    return value, name


def _assigned(text: str) -> tuple[str, str] | None:
    """Return value and name of assignments of constants to different names, in the order of the names."""
    if text.count("=") < 2 or _OR.search(text):
        return None
    sides = [part.split("=") for part in top_parts(text)]
    if len(sides) == 1:
        size = 2 if text.startswith(r"\{") else 1
        sides = [part.split("=") for part in top_parts(text[size:-size])]
    values: dict[str, str] = {}
    for left, *right in sides:
        value = right[0].strip() if len(right) == 1 else ""
        if not value or not SIMPLE_NAME.fullmatch(left) or VARIABLE.search(value) or RELATION.search(value):  # fmt: skip
            return None
        values[name_spelling(left)] = value
    if len(values) != len(sides) or len(values) < 2:
        return None
    names = sorted(values)
    return f"({','.join(values[name] for name in names)})", f"({','.join(names)})"


def top_parts(text: str) -> list[str]:
    """Return the parts of `text` between the commas, semicolons and `and` outside all brackets."""
    parts, depth = [""], 0
    for mark in re.findall(r"\\.|.", AND.sub(",", text), re.DOTALL):
        depth += (mark in ("(", "[", "{", r"\{")) - (mark in (")", "]", "}", r"\}"))
        if depth == 0 and mark in ",;":
            parts.append("")
        else:
            parts[-1] += mark
    return parts


@lru_cache(maxsize=1024)  # problems share their few names
def _name(left: str) -> str | None:
    """Return the left side of `=` as a normalised name; None if it contains an operation, as in `2x`."""
    bare = _SCRIPT.sub("", _SCRIPT.sub("", left))
    is_name = (
        re.search(r"[A-Za-z]", left) is not None
        and all(left.count(opening) == left.count(closing) for opening, closing in ("()", "{}"))
        and not _UNDERLINED_NUMBER.search(left)
        and not _NUMBER_IN_NAME.search(bare)
        and not re.search(r"[,;]", bare if not left.startswith("(") else "")
        and not RELATION.search(bare)
    )
    return name_spelling(left) if is_name else None


def name_spelling(name: str) -> str:
    name = re.sub(r"\\(?:text|mathrm|mathbf|operatorname|mathit|vec|boldsymbol)\s*(?=\{)", "", name)
    name = re.sub(r"\\(?=max|min|text)", "", name)
    return re.sub(r"\{(\w)\}", r"\1", re.sub(r"\s+", "", name))


def _ascii(text: str) -> str:
    """Replace Unicode mathematics by LaTeX; `3½` becomes a whole number and a fraction, `４２` becomes 42."""
    result: list[str] = []
    for character in text:
        if character in _UNICODE:
            result.append(_UNICODE[character])
        elif unicodedata.decomposition(character).startswith("<fraction>"):
            top, bottom = unicodedata.normalize("NFKC", character).split("⁄")
            result.append(rf"\frac{{{top}}}{{{bottom}}}" if bottom else character)
        elif unicodedata.decomposition(character).startswith(("<wide>", "<font>")):
            result.append(unicodedata.normalize("NFKC", character))
        else:
            result.append(character)
    return _ROOT.sub(lambda m: rf"\sqrt{{{m[1].strip('(){}')}}}", "".join(result))


def _unwrapped(text: str) -> str:
    """Remove one pair of marks that encloses all of `text`, or `$` around its parts."""
    if text[:1] not in ("$", "\\", "{", "(") and "$" not in text:
        return text
    for opening, closing in _DELIMITERS:
        length = len(opening)
        if text.startswith(opening) and text.endswith(closing) and len(text) > 2 * length:
            inner = text[length:-length]
            if opening not in inner:
                return inner.strip()
    if "$" in text and len(dollars := _DOLLAR.findall(text)) > 1 and len(dollars) % 2 == 0:
        return _DOLLAR.sub("", text).strip()
    if match := _WRAPPER.match(text):
        if closing_brace(text, match.end()) == len(text) - 1:
            return text[match.end() : -1].strip()
    if text.startswith("{") and closing_brace(text, 1) == len(text) - 1:
        return text[1:-1].strip()
    return _alone(text)


def _alone(text: str) -> str:
    """Remove parentheses or set braces around all of `text`, unless it is a tuple, a choice or a condition.

    `(7 or 8)` is a list.
    """
    size = 2 if text.startswith(r"\{") and text.endswith(r"\}") else 1
    if size == 1 and not (text.startswith("(") and text.endswith(")")) or _CHOICE.fullmatch(text):
        return text
    inner = text[size:-size]
    depth = 0
    for mark in re.findall(r"[][(){}]|[,;]|[|:<>]", inner):
        depth += (mark in "([{") - (mark in ")]}")
        if depth < 0 or depth == 0 and (mark in ",;" or size == 2 and mark in "|:<>"):
            return text
    return text if size == 2 and AND.search(inner) else inner.strip()


def closing_brace(text: str, start: int) -> int:
    """Return the end of the group that opens just before `start`; -1 if it is not closed."""
    depth = 1
    for match in re.compile(r"\\[{}]|[{}]").finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return -1
