r"""Units, and only units, are removed after a number."""

import pytest

from phimini.stages.verify.units import split_currency, split_unit
from phimini.stages.verify.verdict import judge

UNITS = {
    "cm": [r"5\text{ cm}", "5 cm", "5cm", r"5\,\mathrm{cm}", r"5 \text{centimeters}", r"5\mbox{ cm}^2", "5 cm^2",
           r"5\,{\rm cm}", r"5\text{ square centimetres}", r"5\mathrm{~cm}^{3}", r"5\text{ cubic cm}"],
    "m": [r"5\mathrm{m}", r"5\text{ m}", "5 meters", "5 meters squared", r"5 \text{ sq. m}"],
    "km/h": [r"5\text{ km/h}", "5 kilometers per hour", r"5\,\mathrm{km}/\mathrm{h}", r"5\frac{\text{km}}{\text{h}}", "5 kph",
             r"5\text{ km}\cdot\text{h}^{-1}"],
    "mi/h": ["5 mph", r"5\text{ miles per hour}"],
    "degree": [r"5^\circ", r"5^{\circ}", "5°", "5 degrees", r"5\degree", r"5^\circ\text{C}", r"5^\circ F", r"5\text{ degrees Fahrenheit}"],
    "percent": ["5%", r"5\%", "5 percent", r"5\text{ percent}"],
    "dollar": ["5 dollars", r"5\text{ USD}", r"5\$"],
    "lb": ["5 lbs", "5 pounds", r"5\text{ lb.}"],
    "pm": ["5 p.m.", r"5\text{ PM}"],
    "": ["5 apples", r"5\text{ people}", "5 units", r"5\text{ square units}", "5th", r"5^{\text{th}}"],
}  # fmt: skip
# An operation, a multiplier, a constant, a variable, a word that is no unit, half a fraction.
PART_OF_THE_ANSWER = [
    r"5\text{ squared}", r"5\text{ cubed}", r"5\text{!}", r"5\text{ factorial}", r"5\text{ choose }2", r"5\text{ plus }6",
    r"5\text{ million}", r"5\text{ dozen}", r"5\text{ hundred}", r"5\text{ halves}", r"5\text{ or more}", r"5\text{ or }6",
    r"5\mathrm{i}", r"5\mathrm{e}", r"5\mathrm{\pi}", r"5\text{ pi}", r"5\,\mathrm{i}", r"\frac12\mathrm{\pi}",
    r"5\text{x}", r"5\mathrm{n}", r"5\textbf{x}", "5 m", "5m", "5mg", "5n", "5x", r"5\mathrm{k}", r"2\sqrt3\text{x}",
    r"5\text{log}", r"5\mathrm{d}x", r"5\text{ percent of x}", r"5\text{ per x}", "x^2", "90^{\\circ}30", r"\text{Monday}",
]  # fmt: skip


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_is_split_off_and_named(unit: str) -> None:
    assert {text: split_unit(text) for text in UNITS[unit]} == dict.fromkeys(
        UNITS[unit], ("5", unit)
    )


@pytest.mark.parametrize("text", PART_OF_THE_ANSWER)
def test_what_is_no_unit_stays(text: str) -> None:
    assert split_unit(text) == (text, None)
    number = text[0] if text[0] == "5" else r"\frac12"
    assert not judge(rf"\boxed{{{text}}}", number)


@pytest.mark.parametrize(
    ("text", "number", "unit"),
    [
        ("$5", "5", "dollar"), (r"\$5.00", "5.00", "dollar"), (r"-\$5", "-5", "dollar"), (r"US\$ 12", "12", "dollar"),
        ("€7", "7", "euro"), (r"\pounds 5", "5", "£"), ("£5", "5", "£"), (r"\text{Rs. }5", "5", "rupee"),
        (r"\$", r"\$", None), (r"\pi", r"\pi", None), ("-5", "-5", None), ("$x$", "$x$", None),
    ],
)  # fmt: skip
def test_a_currency_stands_before_its_number(text: str, number: str, unit: str | None) -> None:
    assert split_currency(text) == (number, unit)


@pytest.mark.parametrize(
    ("response", "answer", "correct"),
    [
        ("5", r"5\text{ cm}", True), ("5 cm", "5", True), ("5 cm", r"5\text{ centimeters}", True),
        (r"5\text{ in}^2", r"5 \mbox{ inches}^2", True), ("$5", "5 dollars", True), ("5 people", "5 students", True),
        ("5 cm", r"5\text{ m}", False), ("5 dollars", "5 cents", False), ("5 hours", r"5\text{ minutes}", False),
        (r"5\text{ km/h}", "5 mph", False), (r"5^\circ", "5 cm", False), (r"2\pi\text{ cm}", r"2\pi", True),
        (r"2\pi\text{ cm}", r"2\pi\text{ m}", False), (r"2\sqrt{3}", r"2\sqrt3\text{ square units}", True),
        (r"[0,5)\text{ cm}", "[0,5)", True), (r"2\mathrm{\pi}", r"2\pi", True),
    ],
)  # fmt: skip
def test_a_unit_on_both_sides_is_compared(response: str, answer: str, correct: bool) -> None:
    assert judge(rf"\boxed{{{response}}}", answer).correct == correct
