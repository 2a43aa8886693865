"""The demo's problems and teacher, checked by independent code.

Answers are recomputed from the question's text alone, and every equation that a teacher writes is read back.
"""

import random
import re
from collections import Counter
from fractions import Fraction

import pytest

from phimini.stages.config.recipes import recipe_config
from phimini.stages.data.arithmetic_problems import (
    FAMILIES,
    LEVELS,
    Problem,
    generate_problems,
    number_key,
    teach,
)
from phimini.stages.data.arithmetic_teacher import Ref, Step, carry_out, work_aloud

BOXED = re.compile(r"\\boxed\{(-?\d+)\}$")
EQUATION = re.compile(r"(-?\d+(?:[-+*/]\d+)*)=(-?\d+)(?:r(\d+))?")


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def answer_from_text(problem: Problem) -> int:
    """Compute the answer from the wording of the question, without a plan and by another method where possible."""
    text, n = problem.question, numbers(problem.question)
    match problem.family:
        case "sum":
            return sum(int(t.replace(" ", "")) for t in re.findall(r"(?:[-+] )?\d+", text))
        case "product":
            return sum(n[0] for _ in range(n[1]))
        case "division":
            a, b = (n[1], n[0]) if text.startswith("How many") else (n[0], n[1])
            whole = Fraction(a, b)
            quotient = whole.numerator // whole.denominator
            return int((whole - quotient) * b) if "mod" in text or "remainder" in text else quotient
        case "equation":
            left, right = re.sub(r"(\d+)x", r"\1*x", text.strip(".").replace(" for x", "")).split(
                "="
            )
            left = left.split("Solve ")[-1].split("if ")[-1]
            return next(x for x in range(200) if eval(left, {"x": x}) == eval(right, {"x": x}))
        case "sequence":
            # Any polynomial of degree 2 through the last three terms; a line is one.
            return 3 * n[-1] - 3 * n[-2] + n[-3]
        case "story":
            a, b, c, *more = n
            d, m = (*more, *(0, 1)[len(more) :])
            share = Fraction(a + b * c - d, m)
            assert share.denominator == 1, f"does not come out even: {text}"
            return share.numerator
        case _:
            raise AssertionError(f"no check for family {problem.family}")


def boxed(rollout: str) -> str:
    found = BOXED.search(rollout)
    assert found, f"no boxed answer at the end of {rollout!r}"
    return found.group(1)


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return generate_problems(5, 1800, balanced=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_agree_with_the_question_as_worded(problems: list[Problem], family: str) -> None:
    mine = [p for p in problems if p.family == family]
    assert len(mine) == 300
    for p in mine:
        assert int(p.answer) == answer_from_text(p), p.question
        assert int(p.answer) >= 0, p.question


def test_a_teacher_without_slips_is_right_in_both_manners(problems: list[Problem]) -> None:
    for quick in (0.0, 0.5, 1.0):
        wrong = [p for p in problems if boxed(teach(p, 0, quick=quick, slip=0.0)) != p.answer]
        assert not wrong, f"quick={quick}: {wrong[0].question}"


def false_equations(rollout: str) -> list[str]:
    """Return every false equation in the text, and every column result that contradicts its question."""
    thought = rollout.removeprefix("<think>").split("</think>")[0]
    false = []
    for line in thought.split("\n"):
        question, _, shown = re.sub(r":.*;", "=", line).partition("=")
        for left, right, rest in [
            *EQUATION.findall(line),
            *EQUATION.findall(f"{question}={shown}"),
        ]:
            if "/" in left:
                a, b = map(int, left.split("/"))
                true = rest != "" and int(right) * b + int(rest) == a and 0 <= int(rest) < b
            else:
                true = eval(left) == int(right)
            if not true:
                false.append(f"{left}={right}r{rest}")
    return false


def test_what_a_teacher_without_slips_writes_is_true_arithmetic(problems: list[Problem]) -> None:
    for p in problems:
        for quick in (0.0, 0.5, 1.0):
            rollout = teach(p, 1, quick=quick, slip=0.0)
            assert re.fullmatch(r"<think>[-+*/=:;,r\d\n]+</think>\\boxed\{\d+\}", rollout), rollout
            assert not false_equations(rollout), rollout


def read_columns(op: str, steps: list[str]) -> int | tuple[int, int]:
    """Return the result that the digits of written columns spell, units first (for a division from the front)."""
    values = [step.split("=")[1] for step in steps]
    if op == "/":
        digits, rests = zip(*(value.split("r") for value in values), strict=True)
        return int("".join(digits)), int(rests[-1])
    assert op != "-" or all(len(value) == 1 for value in values), steps
    return int(values[-1] + "".join(value[-1] for value in reversed(values[:-1])))


def test_columns_spell_their_result(problems: list[Problem]) -> None:
    ops = Counter()
    for p in problems:
        thought = teach(p, 1, quick=0.0, slip=0.0).removeprefix("<think>").split("</think>")[0]
        for question, columns, shown in re.findall(r"(.+):(.+);(.+)", thought):
            op = re.sub(r"\d", "", question)
            result = int(shown) if op != "/" else tuple(map(int, shown.split("r")))
            assert read_columns(op, columns.split(",")) == result, f"{question}:{columns};{shown}"
            ops[op] += 1
    assert min(ops[op] for op in "+-*/") > 100, ops


def test_a_slip_writes_false_arithmetic(problems: list[Problem]) -> None:
    """Negative control of the test above: each wrong answer has a false line."""
    wrong = [r for p in problems if boxed(r := teach(p, 2, quick=0.5, slip=0.3)) != p.answer]
    assert len(wrong) > 200
    for rollout in wrong:
        assert false_equations(rollout), rollout


def test_columns_never_slip_and_facts_are_known_by_heart(problems: list[Problem]) -> None:
    assert all(boxed(teach(p, 3, quick=0.0, slip=1.0)) == p.answer for p in problems)
    facts = (Step("*", 9, 8), Step("quotient", 69, 7), Step("+", 9, 4), Step("-", 9, 4))
    for fact in facts:
        lines, result = work_aloud((fact,), random.Random(0), quick=1.0, slip=1.0)
        assert result == carry_out((fact,)) and ":" not in lines[0]


def test_a_slip_is_carried_on_to_any_depth() -> None:
    """Wrong results reach divisors and minuends; the plan still ends, with a boxed number."""
    plan = (
        Step("-", 5, 4),
        Step("-", 30, 29),
        Step("-", Ref(1), 8),
        Step("quotient", Ref(2), Ref(0)),
    )
    for seed in range(200):
        _, result = work_aloud(plan, random.Random(seed), quick=1.0, slip=1.0)
        assert isinstance(result, int)


def test_written_examples() -> None:
    def lines(step: Step) -> str:
        return "\n".join(work_aloud((step,), random.Random(0), quick=0.0, slip=0.0)[0])

    assert lines(Step("+", 47, 38)) == "47+38:7+8=15,4+3+1=8;85"
    assert lines(Step("-", 402, 38)) == "402-38:12-8=4,9-3=6,3-0=3;364"
    assert lines(Step("*", 7, 268)) == "268*7:8*7=56,6*7+5=47,2*7+4=18;1876"
    assert lines(Step("*", 64, 48)) == (
        "64*8:4*8=32,6*8+3=51;512\n64*4:4*4=16,6*4+1=25;256\n"
        "2560+512:0+2=2,6+1=7,5+5=10,2+0+1=3;3072"
    )
    assert lines(Step("remainder", 1071, 5)) == "1071/5:10/5=2r0,7/5=1r2,21/5=4r1;214r1"


@pytest.mark.parametrize(
    ("slip", "low", "high"), [(0.0, 0.0, 0.0), (0.15, 0.08, 0.16), (0.3, 0.17, 0.28)]
)
def test_share_of_wrong_rollouts(
    problems: list[Problem], slip: float, low: float, high: float
) -> None:
    wrong = [boxed(teach(p, k, quick=0.5, slip=slip)) != p.answer for p in problems for k in (0, 1)]
    assert low <= sum(wrong) / len(wrong) <= high


def test_slower_rollouts_are_more_often_right(problems: list[Problem]) -> None:
    """Right rollouts are longer than wrong ones, which makes preference pairs informative."""
    longer = shorter = 0
    for p in problems:
        rollouts = [teach(p, k, quick=0.5, slip=0.15) for k in range(4)]
        right = [r for r in rollouts if boxed(r) == p.answer]
        wrong = [r for r in rollouts if boxed(r) != p.answer]
        if right and wrong:
            longer += len(right[0]) > len(wrong[0])
            shorter += len(right[0]) < len(wrong[0])
    assert longer + shorter > 300 and longer > 2 * shorter, (longer, shorter)


def test_everything_follows_from_the_seed(problems: list[Problem]) -> None:
    assert generate_problems(5, 1800, balanced=True) == problems
    p = problems[0]
    assert teach(p, 7, quick=0.5, slip=0.1) == teach(p, 7, quick=0.5, slip=0.1)
    assert (
        len(
            {teach(q, 7, quick=0.5, slip=0.1) == teach(q, 8, quick=0.5, slip=0.1) for q in problems}
        )
        == 2
    )
    assert {q.question for q in generate_problems(6, 1800, balanced=True)} != {
        q.question for q in problems
    }
    assert len({q.id for s in (5, 6) for q in generate_problems(s, 300)}) == 600


def test_sets_kept_apart_share_no_numbers() -> None:
    """Sets share no numbers of a text, in any order, wording, family or level."""
    held_out = generate_problems(777, 504, balanced=True)
    banned = {p.key for p in held_out}
    training = generate_problems(1, 6000, level_weights=(3, 3, 2), exclude_keys=banned)
    by_numbers = {tuple(sorted(numbers(p.question))) for p in held_out}
    assert len(by_numbers) == len(held_out)
    shared = [p.question for p in training if tuple(sorted(numbers(p.question))) in by_numbers]
    assert not shared, shared[0]
    assert len({p.key for p in training}) == len(training)
    # The same draw without the ban does collide: the test above can fail.
    free = generate_problems(1, 6000, level_weights=(3, 3, 2))
    assert any(p.key in banned for p in free)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_number_ranges_are_wide_enough_for_the_demo(seed: int) -> None:
    """All sets of the demo at once, without using up a cell."""
    demo = recipe_config("tiny").distill
    taken = {p.key for p in generate_problems(demo.heldout_seed, demo.num_heldout, balanced=True)}
    for k, count in enumerate((demo.num_validation, demo.num_prompts)):
        taken |= {p.key for p in generate_problems(10 * seed + k, count, exclude_keys=taken)}
    training = generate_problems(
        10 * seed + 2, demo.num_problems, level_weights=demo.level_weights, exclude_keys=taken
    )
    assert len(training) == demo.num_problems and not taken & {p.key for p in training}


def test_a_key_is_the_same_in_any_order_and_wording() -> None:
    assert number_key("Compute 47 * 6.") == number_key("What is 6 times 47?") == "6,47"
    assert number_key("What is 12 + 9?") != number_key("What is 12 + 90?")


def test_balance_and_weights() -> None:
    cells = Counter((p.family, p.level) for p in generate_problems(3, 504, balanced=True))
    assert set(cells.values()) == {28} and len(cells) == len(FAMILIES) * len(LEVELS)
    cells = Counter((p.family, p.level) for p in generate_problems(3, 100, balanced=True))
    assert set(cells.values()) == {5, 6}
    levels = Counter(p.level for p in generate_problems(3, 2000, level_weights=(3, 1, 0)))
    assert levels[2] == 0 and 1400 < levels[0] < 1600


def test_only_characters_that_a_small_tokenizer_knows(problems: list[Problem]) -> None:
    known = set(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789 .,:;?+-*/=<>\\{}()\n"
    )
    for p in problems:
        text = p.question + teach(p, 0, quick=0.5, slip=0.2)
        assert set(text) <= known, set(text) - known


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="level_weights: expected three"):
        generate_problems(0, 5, level_weights=(0, 0, 0))
    with pytest.raises(ValueError, match="balanced"):
        generate_problems(0, 5, level_weights=(1, 2, 1), balanced=True)
    with pytest.raises(
        ValueError,
        match=r"no new problem of family '\w+', level 0 .* fewer in distill.num_problems",
    ):
        generate_problems(0, 20_000, level_weights=(1, 0, 0))
    with pytest.raises(ValueError, match="quick is a share"):
        teach(generate_problems(0, 1)[0], 0, quick=1.5, slip=0.0)
