r"""The verifier: all known false positives and false negatives."""

import gc
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phimini.stages.verify import symbolic as verify_symbolic
from phimini.stages.verify.verdict import extract_answer, judge, verify


def boxed(answer: str) -> str:
    return f"<think>\n1+1=2</think>The answer is \\boxed{{{answer}}}, I think."


EXTRACTIONS = {
    "plain": (r"so \boxed{42}.", "42"),
    "nested braces": (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    "spaces": ("\\boxed {\n 42 }", "42"),
    "the last box wins": (r"\boxed{41} no wait \boxed{42}", "42"),
    "the last box is not closed": (r"\boxed{42} or \boxed{41", None),
    "not closed": (r"\boxed{42", None),
    "closed for an inner brace only": (r"\boxed{\frac{1}{2}", None),
    "a closed box after an open one": (r"\boxed{ hm \boxed{42}", "42"),
    "box in a box": (r"\boxed{\boxed{42}}", r"\boxed{42}"),
    "work around an inner box": (r"\boxed{\boxed{42}+1}", r"\boxed{42}+1"),
    "escaped braces": (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    "an escaped brace closes nothing": (r"\boxed{42\}", None),
    "stray braces around": (r"}}{ \boxed{42} }{", "42"),
    "empty": (r"\boxed{ }", ""),
    "none": ("the answer is 42", None),
    "no braces": (r"so $\boxed 7$.", "7"),
    "no braces, several digits": (r"\boxed 42", "42"),
    "no braces, no space": (r"\boxed7", "7"),
    "no braces, a choice": (r"\boxed B", "B"),
    "no braces, a decimal before a stop": (r"\boxed 4.2.", "4.2"),
    "no braces is a box like another": (r"\boxed{41} \boxed 7", "7"),
    "no braces, a vulgar fraction": (r"\boxed ½", "½"),
    "no braces, a mixed number": (r"$\boxed -1½$", "-1½"),
    "no braces, full-width digits": (r"\boxed ７．５。", "７．５"),
    "no braces, a fraction": (r"\boxed １／２, so", "１／２"),
    "no braces, a command": (r"\boxed\frac12", r"\frac12"),
    "no braces, thousands": (r"\boxed 1,000, so", "1,000"),
    "no braces, a longer number": (r"\boxed 1,0001", None),
    "no braces, not a number alone": (r"\boxed 7x or \boxed 7^2 or \boxed 2\sqrt{3}", None),
    "no braces, a word": (r"\boxed{41}, which \boxed shows", "41"),
    "thoughts alone": (r"<think>it may be \boxed{42}</think> I do not know.", None),
    "thoughts alone, opened by the prompt": (r"it may be \boxed{42}</think> I do not know.", None),
    "thoughts that do not end": (r"<think>it may be \boxed{42}", None),
    "thoughts, then an answer": (r"<think>\boxed{41}</think> \boxed{42}", "42"),
    "thoughts after the answer": (r"\boxed{42} <think>or \boxed{41}?", "42"),
    "thoughts twice": (r"<think>a</think>\boxed{41}<think>\boxed{43}</think>\boxed{42}", "42"),
    "another command": (r"\boxedfoo{42}", None),
    "empty text": ("", None),
}


@pytest.mark.parametrize("case", EXTRACTIONS)
def test_extract_answer(case: str) -> None:
    text, content = EXTRACTIONS[case]
    assert extract_answer(text) == content


_balanced = st.recursive(
    st.text(st.characters(codec="utf-8", exclude_characters="{}\\")),
    lambda inner: st.lists(inner.map(lambda s: "{" + s + "}") | inner, max_size=4).map("".join),
    max_leaves=8,
)


@given(before=st.text(st.sampled_from("ab {}\\")), content=_balanced, after=_balanced)
@settings(deadline=None)
def test_what_is_boxed_comes_out_whatever_stands_around(
    before: str, content: str, after: str
) -> None:
    # A word character after the backslashes of `before`, so that they do not escape the box's own.
    assert extract_answer(f"{before}.\\boxed{{{content}}}{after}") == content.strip()


EQUAL = {
    "42": ["42", "042", "42.0", "42.", "+42", "42.000", "x=42", "x = 42", r"x_1 = 42", r"\theta=42", "$42$",
           "$$42$$", r"\(42\)", r"\[42\]", r"\text{42}", r"\mathbf{42}", r"\boxed{42}", "{42}", "(42)", "$ 42 $.",
           r"42\%", "42%", r"42\text{ cm}", r"42\,\mathrm{cm}^2", r"42^\circ", r"42^{\circ}", r"\$42", r"\$42.00",
           "４２", r"\{42\}", r"\text{$42$}", r"\boldsymbol{42}", "x=y=42", "m+n=42", r"f(3)=42", r"\frac{m}{n}=42",
           r"x_{\max}=42", r"P(X>3)=42", r"(x=42)", r"\left(42^\circ\right)",
           r"\left(42\right)", r"\displaystyle 42", r"4.2\times 10^{1}", r"4.2\cdot10^1", "4.2e1", "42/1"],
    "-3": ["-3", "- 3", "−3", "-3.0", r"\frac{-3}{1}", "(-3)", "x = -3"],
    "0": ["0", "-0", "0.0", "00", "0/5"],
    "1000": ["1,000", "1{,}000", r"1\,000", r"1\!000", "1,000.0", "1000", r"\$1,000", r"1\times10^{3}"],
    "1234567": ["1,234,567", r"1\,234\,567", "1234567"],
    "1/2": ["½", "50\\%", r"50\text{ percent}", "0.5", ".5", "0.50", "1/2", "1 / 2", "1∕2", "１／２", r"\frac{1}{2}", r"\frac12", r"\dfrac{1}{2}", r"\tfrac{1}{2}",
            r"\frac{-1}{-2}", "{1}/{2}", r"\frac 1 2", "5e-1"],
    r"-\frac{3}{7}": ["-3/7", r"\frac{-3}{7}", r"\frac{3}{-7}", r"-\dfrac{3}{7}"],
    "3 1/2": ["3.5", "7/2", r"3\frac12"],
    "3.5": ["3½", r"3\frac{1}{2}", "3 1/2", r"3\cfrac12", "7/2", r"\frac{7}{2}", "3.50"],
    "-3.5": [r"-3\frac{1}{2}", "-7/2"],
    r"\boxed{42}": ["42"],
    "84/2": ["42", "84/2"],  # a reference may be anything; repeating it is right
    r"50\%": ["50", r"50\%", "0.5", "50 percent", r"\frac{1}{2}"],
    "x=42": ["42", "x = 42", "x=42.0", r"x=42\text{ cm}"],
    "5,-5": [r"\pm 5", r"\pm5", r"x = \pm 5", r"\{\pm 5\}", r"x=5 \text{ or } x=-5", "±5"],
    r"\pm 5": ["5, -5", r"-5 \text{ and } 5"],
    "19,46,82": ["19, 46, and 82", "19, 46 and 82", "82 and 19 and 46", "$19$, $46$, $82$"],
    "19,46": ["19 and 46", "46 or 19", "x_1=19, x_2=46"],
    "(0, 12.5)": ["0<x<12.5", "12.5>x>0", r"0 < t \text{ and } t < 12.5"],
    "[-2,1)": [r"-2\le x<1", r"-2 ≤ x < 1", r"\{x\mid -2\leq x<1\}", r"\{x \in \mathbb{R} : -2 \leqslant x < 1\}"],
    r"-2\le x<1": ["[-2,1)", r"1 > x \ge -2", r"x\in[-2,1)"],
    r"90^\circ,60^\circ": ["60, 90", r"60^{\circ}, 90^{\circ}", r"$90^{\circ}$ and $60^{\circ}$"],
    r"(45^\circ,60^\circ)": ["(45,60)"],
    "(2,500)": ["(2, 500)"],
    "(0, 100)": ["(0,100)"],
    "0,100": ["0, 100", "100, 0"],
    "(1, 2)": ["(x,y) = (1,2)", "(1,2)", "(1, 2.0)", r"\left(1,2\right)", r"(1,\,2)"],
    r"\{1,2\}": [r"\{2, 1\}", "1, 2"],
    "1,2": ["2,1", r"\{1,2\}", "x = 1, 2", "x = 1, x = 2", r"x=1 \text{ or } x=2", r"1\text{ and }2"],
    "1,2,3": [r"1, 2, \text{ and } 3"],
    "101_2": ["101_{2}"],
    "3:30": ["03:30", r"3:30 \text{ p.m.}"],
    r"3:30\text{ p.m.}": ["3:30", "3:30 PM"],
    "[0,1)": ["[0, 1)", r"x \in [0,1)"],
    "B": ["B", "(B)", r"\text{B}", r"\textbf{(B)}", "B.", "b", "B)"],
    r"\text{Monday}": ["Monday", "monday", r"\text{Monday}", r"\mathrm{monday}."],
}  # fmt: skip

DIFFERENT = {
    "42": ["43", "-42", "4.2", "42.01", "4 2", r"4\,2", "42,000", "0x2a", "４３", "42 43", "42,43", "42 or 43",
           r"42\text{ or 43}", r"42\text{ million}", "--42", "1/42", "NaN", "", " ", "None", "forty-two"],
    "x=3": ["y=3", "x=4", "2x=6", "x-3=0", "y"],
    "x_1=3": ["x_2=3", r"\alpha=3"],
    "f(2)=3": ["f(3)=3"],
    "(x,y)=(1,2)": ["(y,x)=(1,2)", "(x,y)=(2,1)"],
    r"x\in(0,1)": [r"y\in(0,1)", "0<y<1", r"0\le x<1"],
    "5,-5": [r"\pm 6", "5", "5,5", r"5\pm 5"],
    "5": [r"\pm 5", "2x=5", "5x"],
    "19,46": ["19 46", "19 and 47"],
    "[-2,1)": ["-2<x<1", r"-2\le x", r"\{x \mid -2 \le y < 1\}"],
    r"3:30\text{ p.m.}": [r"3:30\text{ a.m.}"],
    r"50\%": ["0.05", "5", r"5\%"],
    "0.5": ["50"],
    "1000": ["1,00", "1,0000", "1,000,0", "10,00"],
    "1000000": ["1,000\\,000"],
    "1/2": ["1/3", "0.51", "1", "2", "1/0", r"\frac{1}{0}", "0/0"],
    "1/3": ["0.333", "0.3333333333333333"],
    "3.5": ["3 1/2/1", r"3\frac{-1}{2}"],
    "4.5": [r"3\frac{3}{2}", r"5\frac{-1}{2}"],
    "(2,500)": ["2500", "2,500"],
    "(0,100)": ["100"],
    "0,100": ["100"],
    "1": [r"1\text{ or }2", "x=1, x=2"],
    "x=1,y=2": ["x=2,y=1"],
    "101_2": ["101_3", "110_2"],
    "2:3": ["4:6"],
    "10:30": ["5:15"],
    "3 1/2": ["3/2", "1/2"],
    "(1,2)": ["(2,1)", "[1,2]", "(1,2,3)", "(1)", "1,2"],
    "[0,1)": ["[0,1]", "(0,1)"],
    "A": ["B", "AB", "A, B", "(A) or (B)", "1"],
    r"\text{Monday}": ["Tuesday", "Mon day Tuesday"],
}  # fmt: skip

WORK_LEFT_UNDONE = {
    "42": ["6*7", "40+2", "44-2", "84/2", r"6\cdot7", r"6\times 7", r"\frac{84}{2}", r"\sqrt{1764}", "42+0",
           "42*1", "(40+2)", "x=40+2", "40+2=42", "2x=84", "42=42", "6\\cdot 7\\text{ cm}", "2(21)", "{40}+{2}", "42^1", "84 / 2",
           "(84)/(2)", "84:2", "|42|", "3!*7", r"4.2\times 10", r"42\times10^{0}", "126/3", "--42", "$40$+$2$",
           r"\text{40}+\text{2}", r"\gcd(84,126)", "6 7", r"\boxed{40}+2", r"\lfloor 42 \rfloor", "42^{1}"],
    "1/2": ["2/4", r"\frac{2}{4}", "1-1/2", r"\frac{1+0}{2}", r"1\frac{-1}{2}"],
    "2/3": ["12/18", r"\frac{-12}{-18}"],
    "(1,2)": ["(6-5,2)", r"(\frac{2}{2},2)", "(2/2,2)"],
    r"\sqrt{2}": [r"\sqrt{1+1}", r"\sqrt{\binom{2}{1}}", r"\sum_{i=1}^1 \sqrt{2}", r"\sqrt{2!}"],
}  # fmt: skip


def second(response: str, answer: str) -> str:
    """Return the outcome of the second check, which may be undecided."""
    return verify_symbolic.second.compare(boxed(response), answer)


def cases(table: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(answer, response) for answer, responses in table.items() for response in responses]


@pytest.mark.parametrize(("answer", "response"), cases(EQUAL), ids=str)
def test_spellings_of_the_answer(answer: str, response: str) -> None:
    verdict = judge(boxed(response), answer)
    assert verdict.correct and verdict.reason == "equal", verdict
    assert verify(boxed(response), answer)
    assert second(response, answer) != "different"


@pytest.mark.parametrize(("answer", "response"), cases(DIFFERENT), ids=str)
def test_another_answer(answer: str, response: str) -> None:
    verdict = judge(boxed(response), answer)
    assert not verdict and not verify(boxed(response), answer)
    assert second(response, answer) != "equal"


@pytest.mark.parametrize(("answer", "response"), cases(WORK_LEFT_UNDONE), ids=str)
def test_an_expression_is_no_answer(answer: str, response: str) -> None:
    assert not judge(boxed(response), answer)
    assert second(response, answer) != "equal"


@pytest.mark.parametrize(
    ("response", "extracted", "reason"),
    [
        ("the answer is 42", None, "no closed box"),
        (r"\boxed{42} \boxed{42", None, "no closed box"),
        (r"\boxed{}", "", "empty box"),
        (r"\boxed{41}", "41", "different"),
        (r"\boxed{6*7}", "6*7", "not a number"),
        (r"\boxed{84/2}", "84/2", "not in lowest terms"),
        (r"\boxed{" + "9" * 100_000 + "}", "9" * 100_000, "unreadable"),
        ("42" * 50, None, "no closed box"),
    ],
    ids=["none", "unclosed", "empty", "different", "product", "quotient", "endless", "repeated"],
)
def test_the_verdict_says_why(response: str, extracted: str | None, reason: str) -> None:
    verdict = judge(response, "42")
    assert (verdict.correct, verdict.extracted, verdict.reason) == (False, extracted, reason)


numbers = st.fractions(min_value=-(10**12), max_value=10**12, max_denominator=10**6)


def spellings(value: Fraction) -> list[str]:
    """Return all known spellings of `value`, made with Python's arithmetic."""
    top, bottom = value.numerator, value.denominator
    result = [f"{top}/{bottom}", f"\\frac{{{top}}}{{{bottom}}}", f"\\dfrac{{{-top}}}{{{-bottom}}}"]
    if value >= 0 and bottom > 1 and top > bottom:
        result.append(f"{top // bottom}\\frac{{{top % bottom}}}{{{bottom}}}")
    if bottom == 1:
        result += [
            f"{top}",
            f"{top:,}",
            f"{top:,}".replace(",", "{,}"),
            f"{top}.0",
            f"x = {top}",
            f"${top}$",
        ]
    return result


@given(a=numbers, b=numbers)
@settings(deadline=None)
def test_every_spelling_of_a_number_is_itself_and_no_other_number(a: Fraction, b: Fraction) -> None:
    for reference in spellings(a):
        for response in spellings(a):
            assert verify(boxed(response), reference), f"{response} is {reference}"
        for response in spellings(b):
            assert verify(boxed(response), reference) == (a == b), f"{response} against {reference}"


@given(
    value=st.decimals(
        allow_nan=False, allow_infinity=False, places=6, min_value=-(10**9), max_value=10**9
    )
)
@settings(deadline=None)
def test_decimals_are_exact(value) -> None:
    exact = Fraction(value)
    assert verify(boxed(f"{value:f}"), f"{exact.numerator}/{exact.denominator}")
    nudged = exact + Fraction(1, 10**7)
    assert not verify(boxed(f"{value:f}"), f"{nudged.numerator}/{nudged.denominator}")


@given(
    a=st.integers(0, 10**6),
    b=st.integers(0, 10**6),
    operator=st.sampled_from(["+", "-", "*", r"\cdot ", r"\times "]),
    space=st.sampled_from(["", " "]),
)
@settings(deadline=None)
def test_no_sum_difference_or_product_is_taken_for_its_value(
    a: int, b: int, operator: str, space: str
) -> None:
    value = {"+": a + b, "-": a - b}.get(operator, a * b)
    assert not verify(boxed(f"{a}{space}{operator}{space}{b}"), str(value))


@given(response=st.text(st.sampled_from("\\boxed{}()[]0123456789.,/$%^ =-+xfracte!"), max_size=60))
@settings(deadline=None, max_examples=300)
def test_any_text_gets_a_verdict(response: str) -> None:
    for answer in ("42", "1/2", "(1,2)", "A"):
        judge(boxed(response), answer)
        judge(response, answer)


@pytest.mark.parametrize("answer", ["", " ", "\n"], ids=repr)
def test_a_reference_without_an_answer_is_an_error(answer: str) -> None:
    with pytest.raises(ValueError, match="verify: answer: expected a reference answer"):
        judge(boxed("42"), answer)


@pytest.mark.parametrize(
    "response",
    ["\\boxed{" * 50_000, "\\boxed{" + "{" * 1900 + "1" + "}" * 1900 + "}", "\\boxed{1" + "\\," * 1900 + "}",
     "\\boxed{" + "(" * 4000 + "}", "\\boxed" + " " * 100_000, "\\boxed{1" + "," * 3900 + "}",
     "\\boxed{" + "1,111" * 700 + "}", "\\boxed{" + "1" * 3900 + "/" + "}", "\\boxed{9^{9^{9^9}}}",
     "\\boxed{1e999999999}", "\\boxed{1e99999}", "\\boxed{10^{999999999}}", "\\boxed{" + "x=" * 1900 + "}"],
    ids=range(13),
)  # fmt: skip
def test_a_hostile_box_costs_no_time(response: str) -> None:
    start = time.process_time()
    assert not judge(response, "42")
    assert time.process_time() - start < 0.1


def test_an_exact_verdict_costs_less_than_20_microseconds() -> None:
    """Best CPU seconds of several rounds, because the machine may be busy."""
    trace = "47+385:7+5=12,4+8+1=13,0+3+1=4;=432\n" * 10 + "</think>"
    responses = [
        trace + f"\\boxed{{{text}}}"
        for text in ("432", "1,432", r"\frac{432}{7}", r"432\text{ cm}")
    ]
    calls = 500
    gc.disable()
    for response in responses:
        rounds = []
        for _ in range(5):
            start = time.process_time()
            for _ in range(calls):
                judge(response, "432")
            rounds.append((time.process_time() - start) / calls)
        assert min(rounds) < 20e-6, f"{response[-20:]}: {min(rounds) * 1e6:.1f} us"
    gc.enable()


def test_numbers_never_ask_math_verify() -> None:
    asked = verify_symbolic.shared.num_asked
    for response in ("42", "6*7", r"\sqrt{1764}", "9^{9^{9^9}}", "(1,2)", "nonsense"):
        for answer in ("42", "1/2", "(1,2)", "B"):
            judge(boxed(response), answer)
    assert verify_symbolic.shared.num_asked == asked
