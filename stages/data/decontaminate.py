"""Decontamination: detection of training rows that ask a held-out question, perhaps in other words.

Two questions count as one when their numbers are equal and their words overlap by half. Numbers alone would reject too
much: 10 % of GSM8K's training set has the numbers of some test question, and none of those rows is a copy. Words
alone would confuse questions of one template, which differ in their numbers. See `same_question` for the measure.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

MIN_OVERLAP = 0.5
"""of the words of two questions with equal numbers; the measurements are in tests/stages/data/test_decontaminate.py"""

_NUMBER_WORDS = "two three four five six seven eight nine ten eleven twelve".split()
_NUMBERS = {word: str(value) for value, word in enumerate(_NUMBER_WORDS, start=2)}
# Spellings of one operation or relation: LaTeX, Unicode and words.
_SPELLINGS = {
    "+": "plus add added sum total",
    "-": "− – minus subtract subtracted difference",
    "*": "× · times cdot multiply multiplied product",
    "/": "÷ ⁄ frac dfrac tfrac div divide divided quotient fit remainder mod bmod",
    "≥": "ge geq geqslant",
    "≤": "le leq leqslant",
    "≠": "ne neq",
}
_SPELLED = {name: symbol for symbol, names in _SPELLINGS.items() for name in names.split()}
# Words that any question may have: grammar, and how one is asked for an answer.
_COMMON = frozenset(
    "a all an and are arithmetic as at be been by calculate can compute determine did do does each equal equals "
    "evaluate exactly express expression final find following for from get gets give given had has have he her his how "
    "if in into is it its let many much no not now number of on or out per please problem question she so state that the "
    "their them then there these they this those to up us was we were what when where which who will with would you your "
    "value answer result".split()
)
_LAYOUT = re.compile(
    r"\\(?:left|right|text|mathrm|mathbf|operatorname|displaystyle|quad|[bB]igg?[lr]?(?![a-z])|[,;:! ])"
)
_TOKEN = re.compile(r"\d+(?:\.\d+)?|\.\d+|[^\W\d_]+(?:'[a-z]+)?|[-+*/=<>^≥≤≠−–×·÷⁄%√∫!|°]")

Numbers = tuple[str, ...]


class Fingerprint(NamedTuple):
    """The features by which questions are compared."""

    readings: frozenset[Numbers]
    """its numbers in ascending order; a second reading leaves out those in words (`the two trains`)"""
    words: frozenset[str]
    """words by their first five letters, operators, and each three adjacent symbols of a formula"""


def fingerprint(question: str) -> Fingerprint:
    """Return the numbers and words of a question; letter case, spacing and LaTeX's spellings make no difference.

    `1,000`, `1{,}000`, `1000` and `1000.0` are one number; `\\ge`, `\\geq` and `>=` one operator. Numbers in formulas are
    masked: `x^2 + 3` gives `^`, `+`, `x^#`, `^#+` and `#+#`. Words that any question may have count only where
    there are no others.
    """
    digits: list[str] = []
    spelled: list[str] = []
    words, common, formula = set(), set(), []
    for written in map(str, _TOKEN.findall(_plain(question))):
        token = _SPELLED.get(written, written)
        if token in _NUMBERS:
            spelled.append(_NUMBERS[token])
            formula.append("#")
        elif token[0].isdecimal() or token[0] == ".":
            digits.append(_canonical(token))
            formula.append("#")
        elif len(token) == 1:
            formula.append(token)
        else:
            (common if token in _COMMON else words).add(token.removesuffix("s")[:5])
            words |= _terms(formula)
            formula = []
    words |= _terms(formula)
    readings = {tuple(sorted(digits + spelled))} | ({tuple(sorted(digits))} if digits else set())
    return Fingerprint(frozenset(readings), frozenset(words or common))


def _terms(formula: list[str]) -> set[str]:
    """Return a formula's operators, and each three adjacent symbols of it."""
    rows = {"".join(symbols) for symbols in zip(formula, formula[1:], formula[2:], strict=False)}
    operators = {symbol for symbol in formula if symbol != "#" and not symbol.isalpha()}
    return operators | (rows - {"###"})


def same_question(one: Fingerprint, other: Fingerprint) -> bool:
    """Return True if two questions count as one: equal numbers, and words that overlap by `MIN_OVERLAP`.

    The overlap is the Dice coefficient 2 |A & B| / (|A| + |B|) of the sets of words. It ignores their order because a
    paraphrase moves clauses, and counts both sizes because a short question's words all occur in some long one.
    """
    total = len(one.words) + len(other.words)
    shared = len(one.words & other.words)
    return not one.readings.isdisjoint(other.readings) and 2 * shared >= MIN_OVERLAP * total


class Questions:
    """An index of questions by their numbers: a question is compared only with those of equal numbers."""

    def __init__(self, questions: Iterable[str] = ()) -> None:
        self._by_numbers: dict[Numbers, list[int]] = defaultdict(list)
        self._added: list[Fingerprint] = []
        for question in questions:
            self.add(question)

    def add(self, question: str) -> None:
        """Add a question to the index."""
        new = fingerprint(question)
        for numbers in new.readings:
            self._by_numbers[numbers].append(len(self._added))
        self._added.append(new)

    def matches(self, question: str) -> Iterator[int]:
        """Return the indices, in order of addition, of the questions that count as this one."""
        asked = fingerprint(question)
        near = {i for numbers in asked.readings for i in self._by_numbers.get(numbers, ())}
        return (i for i in sorted(near) if same_question(asked, self._added[i]))

    def __contains__(self, question: str) -> bool:
        return next(self.matches(question), None) is not None


class Excerpts:
    """An index of questions by their sequences of words, for longer questions that quote one, and by their text with numbers masked."""

    def __init__(
        self, questions: Iterable[tuple[str, str]], length: int | None, *, masked: bool
    ) -> None:
        """questions: pairs of id and text. length: words, numbers and signs of a sequence. masked: match other numbers too."""
        self._length, self._masked = length, masked
        self._found: dict[tuple[str, ...], str] = {}
        for id, question in questions:
            for key, how in self._keys(question):
                self._found.setdefault(key, f"{how} held-out question {id}")

    def match(self, question: str) -> str | None:
        """Return how a question is like one of the index, and the id of that one; None if it is like none."""
        return next(
            (self._found[key] for key, _ in self._keys(question) if key in self._found), None
        )

    def _keys(self, question: str) -> Iterator[tuple[tuple[str, ...], str]]:
        words = [_SPELLED.get(token, token) for token in map(str, _TOKEN.findall(_plain(question)))]
        if self._length is not None:
            for start in range(len(words) - self._length + 1):
                yield tuple(words[start : start + self._length]), f"{self._length} words of"
        if self._masked:
            is_number = lambda word: word[0].isdecimal() or word[0] == "." or word in _NUMBERS
            yield ("masked", *("#" if is_number(word) else word for word in words)), "other numbers in"  # fmt: skip


def _plain(question: str) -> str:
    """Return lower case text with one spelling of each character, no layout commands, no separators within numbers or words."""
    text = unicodedata.normalize("NFKC", question).lower().replace("’", "'")
    text = text.replace(">=", "≥").replace("<=", "≤").replace("!=", "≠")
    text = re.sub(r"([(\[{]\d+)((?:,\d+)+)(?=\\?[)\]}])", lambda m: m[1] + m[2].replace(",", ", "), text)  # fmt: skip
    text = re.sub(r"(?<=\d)(?:,|\{,\}|\\,|,\\!)(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<=frac)(\d)(\d)", r" \1 \2", text)  # \frac12
    text = re.sub(r"(?<=[a-z]{2})-(?=[a-z]{2})", " ", text)
    return _LAYOUT.sub(" ", text)


def _canonical(number: str) -> str:
    whole, _, part = number.partition(".")
    part = part.rstrip("0")
    return (whole.lstrip("0") or "0") + (f".{part}" if part else "")
