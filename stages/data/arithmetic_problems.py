"""The demo's data: arithmetic problems of several families and three levels, with answers and worked rollouts.

Two problems are the same when the same numbers occur in their questions, in any order, wording or family: that is
`Problem.key`, and sets that must not overlap (held out, validation, training) are kept apart by it. Numbers alone are
enough here: the templates are few, so the numbers are what differs, and a problem too many is drawn again at no cost.
Questions of other sources are compared by `decontaminate`.
"""

import random
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from phimini.stages.data.arithmetic_teacher import Op, Plan, Ref, Step, carry_out, work_aloud

LEVELS = (0, 1, 2)
MAX_DRAWS = 10_000
"""draws of one problem before its family and level count as used up"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """An arithmetic problem with its answer and the plan that computes it."""

    id: str
    """unique over seeds and over the problems of one seed"""
    family: str
    level: int
    """0 easy, 1 medium, 2 hard"""
    question: str
    answer: str
    """a whole number in decimal"""
    key: str
    """the numbers of the question in ascending order, e.g. `3,12,47`"""
    plan: Plan
    """how to work it out; the last step's result is the answer"""


def _sum(rng: random.Random, level: int) -> tuple[str, Plan]:
    """Two, three or four numbers, added and taken away; no partial result is negative."""
    numbers = [rng.randint(10, 99)]
    total, text, plan = numbers[0], str(numbers[0]), []
    for i in range(level + 1):
        number = rng.randint(10, 99)
        sign: Op = "-" if number <= total and rng.random() < 0.5 else "+"
        total += number if sign == "+" else -number
        text += f" {sign} {number}"
        plan.append(Step(sign, Ref(i - 1) if i else numbers[0], number))
    question = rng.choice(["Compute {}.", "What is {}?", "Find the value of {}."])
    return question.format(text), tuple(plan)


def _product(rng: random.Random, level: int) -> tuple[str, Plan]:
    """Two digits by one, three digits by a small one, three digits by a large one."""
    (low, high), (least, most) = [
        ((11, 99), (3, 9)),
        ((101, 299), (2, 5)),
        ((300, 499), (6, 9)),
    ][level]
    a, b = rng.randint(low, high), rng.randint(least, most)
    question = rng.choice(["Compute {} * {}.", "What is {} times {}?", "Multiply {} by {}."])
    return question.format(a, b), (Step("*", a, b),)


def _division(rng: random.Random, level: int) -> tuple[str, Plan]:
    """The quotient or the remainder of a division by one digit."""
    (low, high), (least, most) = [
        ((300, 499), (2, 5)),
        ((500, 999), (2, 5)),
        ((500, 999), (6, 9)),
    ][level]
    a, b = rng.randint(low, high), rng.randint(least, most)
    op: Op = rng.choice(["quotient", "remainder"])
    if op == "remainder":
        question = rng.choice(["Find {} mod {}.", "What is the remainder of {} divided by {}?"])
    else:
        question = rng.choice(
            ["How many times does {1} fit in {0}?", "What is the quotient of {} divided by {}?"]
        )
    return question.format(a, b), (Step(op, a, b),)


def _equation(rng: random.Random, level: int) -> tuple[str, Plan]:
    """Linear in x, with x on one side (levels 0 and 1) or on both."""
    x = rng.randint(*[(2, 12), (5, 40), (5, 40)][level])
    a = rng.randint(*[(2, 9), (3, 9), (4, 9)][level])
    b = rng.randint(*[(1, 30), (10, 90), (10, 90)][level])
    if level == 2:
        c = rng.randint(1, a - 2)
        d = (a - c) * x + b
        question = rng.choice(["Solve {}x + {} = {}x + {}.", "Find x if {}x + {} = {}x + {}."])
        plan = Step("-", a, c), Step("-", d, b), Step("quotient", Ref(1), Ref(0))
        return question.format(a, b, c, d), plan
    minus = b < a * x and rng.random() < 0.3
    c = a * x - b if minus else a * x + b
    question = rng.choice(["Solve {}x {} {} = {}.", "Find x if {}x {} {} = {}."])
    plan = Step("+" if minus else "-", c, b), Step("quotient", Ref(0), a)
    return question.format(a, "-" if minus else "+", b, c), plan


def _sequence(rng: random.Random, level: int) -> tuple[str, Plan]:
    """The next number: equal differences (levels 0 and 1) or differences that grow evenly."""
    question = rng.choice(["What comes next: {}?", "Find the next number: {}."])
    start = rng.randint(*[(1, 60), (10, 150), (1, 60)][level])
    difference = rng.randint(*[(2, 12), (11, 60), (2, 25)][level])
    growth = rng.randint(1, 9) if level == 2 else 0
    terms = [start]
    for i in range(3 + (level == 2)):
        terms.append(terms[-1] + difference + growth * i)
    if level == 2:
        plan = (
            Step("-", terms[-2], terms[-3]),
            Step("-", terms[-1], terms[-2]),
            Step("-", Ref(1), Ref(0)),
            Step("+", Ref(1), Ref(2)),
            Step("+", terms[-1], Ref(3)),
        )
    elif start > difference and rng.random() < 0.3:
        terms.reverse()
        plan = Step("-", terms[-2], terms[-1]), Step("-", terms[-1], Ref(0))
    else:
        plan = Step("-", terms[-1], terms[-2]), Step("+", terms[-1], Ref(0))
    return question.format(", ".join(map(str, terms))), plan


def _story(rng: random.Random, level: int) -> tuple[str, Plan]:
    """Someone has a things, buys b boxes of c, gives d away, shares the rest among m friends."""
    name, things = rng.choice(["Ann", "Bob", "Eva", "Tom"]), rng.choice(["books", "coins", "pens"])
    a = rng.randint(*[(5, 40), (15, 90), (40, 200)][level])
    b = rng.randint(3, 9)
    c = rng.randint(*[(3, 12), (11, 40), (11, 40)][level])
    bought = Step("*", c, b), Step("+", a, Ref(0))
    start = f"{name} has {a} {things}"
    if level == 0:
        return f"{start} and buys {b} boxes of {c}. How many {things} now?", bought
    d = rng.randint(3, 40)  # less than there are
    if level == 1:
        question = f"{start}, buys {b} boxes of {c} and gives away {d}. How many {things} are left?"
        return question, (*bought, Step("-", Ref(1), d))
    m = rng.randint(3, 9)
    d += (a + b * c - d) % m
    question = (
        f"{start}, buys {b} boxes of {c}, gives away {d} and shares the rest among {m} friends. "
        f"How many {things} does each friend get?"
    )
    return question, (*bought, Step("-", Ref(1), d), Step("quotient", Ref(2), m))


_DRAW: dict[str, Callable[[random.Random, int], tuple[str, Plan]]] = {
    "sum": _sum,
    "product": _product,
    "division": _division,
    "equation": _equation,
    "sequence": _sequence,
    "story": _story,
}
FAMILIES = tuple(_DRAW)


def number_key(question: str) -> str:
    """Return the numbers of a question in ascending order: equal for the same numbers in any order and wording."""
    return ",".join(map(str, sorted(int(n) for n in re.findall(r"\d+", question))))


def generate_problems(
    seed: int,
    count: int,
    *,
    level_weights: tuple[float, ...] = (1.0, 1.0, 1.0),
    exclude_keys: Collection[str] = frozenset(),
    balanced: bool = False,
) -> list[Problem]:
    """Return `count` problems with different keys outside `exclude_keys`; the same for the same arguments.

    Families are equally likely and levels as `level_weights` say; `balanced` instead goes round all families and
    levels, so that none of their pairs has more than one problem more than another.
    Raises ValueError when a family and level has no problem left that is new.
    """
    if len(level_weights) != len(LEVELS) or min(level_weights) < 0 or not any(level_weights):
        raise ValueError(f"level_weights: expected three weights, not all 0, got {level_weights}")
    if balanced and len(set(level_weights)) > 1:
        raise ValueError(f"level_weights: balanced problems need equal ones, got {level_weights}")
    used = set(exclude_keys)
    problems = []
    for i in range(count):
        rng = random.Random(f"problem {seed} {i}")
        if balanced:
            family = FAMILIES[i % len(FAMILIES)]
            level = LEVELS[i // len(FAMILIES) % len(LEVELS)]
        else:
            family, level = rng.choice(FAMILIES), rng.choices(LEVELS, level_weights)[0]
        for _ in range(MAX_DRAWS):
            question, plan = _DRAW[family](rng, level)
            key = number_key(question)
            if key not in used:
                break
        else:
            raise ValueError(
                f"no new problem of family {family!r}, level {level} in {MAX_DRAWS} draws after {i} of {count}; "
                "ask for fewer in distill.num_problems, num_prompts, num_validation and num_heldout together"
            )
        used.add(key)
        problems.append(
            Problem(
                id=f"{seed}-{i:05d}",
                family=family,
                level=level,
                question=question,
                answer=str(carry_out(plan)),
                key=key,
                plan=plan,
            )
        )
    return problems


def teach(problem: Problem, seed: int, *, quick: float, slip: float) -> str:
    """Return one rollout of the teacher: `<think>`, a line per operation, `</think>`, the boxed answer, right or not.

    quick, slip: see `work_aloud`. Equal arguments give equal rollouts. Raises ValueError for a share outside [0, 1].
    """
    for name, share in (("quick", quick), ("slip", slip)):
        if not 0 <= share <= 1:
            raise ValueError(f"teach: {name} is a share from 0 to 1, got {share}")
    rng = random.Random(f"rollout {problem.id} {seed}")
    lines, result = work_aloud(problem.plan, rng, quick=quick, slip=slip)
    thought = "\n".join(lines)
    return f"<think>{thought}</think>\\boxed{{{result}}}"
