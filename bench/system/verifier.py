r"""Time verdicts through the pool of `rollout.judges`: integers, and LaTeX expressions that need math-verify.

    phimini bench verifier --json verifier.jsonl

A row is verdicts per second of wall time, from the first answer that is given to the last verdict. The answers are those
of groups of 8 rollouts to one question; no expression comes twice. `cpu_seconds` of a row's info counts all processes, so
that on a machine with other work `workers` divided by it bounds the rate of idle cores. Every verdict is checked.
"""

import random
import sys
import time
from collections.abc import Callable
from itertools import pairwise

import psutil

from phimini.bench.gate.options import at_least_one, finish, parser
from phimini.bench.gate.rows import Row
from phimini.stages.verify.scorer import Answered, Scorer

GROUP = 8
"""answers to a question, half of them right"""
Case = tuple[Answered, float]
"""an answer and its score"""


def main(argv: list[str] | None = None) -> int:
    """Return 0; 1 where a verdict is wrong."""
    options = parser("verifier", __doc__)
    options.add_argument("--workers", type=at_least_one, default=2, help="processes of the pool")
    options.add_argument("--rounds", type=at_least_one, default=5, help="rounds of fresh answers")
    options.add_argument("--quick", action="store_true", help="few answers")
    args = options.parse_args(argv)
    sizes = (800, 80) if args.quick else (200_000, 2000)
    kinds = {"integer": (integers, sizes[0]), "symbolic": (expressions, sizes[1])}
    rows = [
        measure(kind, make, size, args.workers, args.rounds) for kind, (make, size) in kinds.items()
    ]
    for row in rows:
        band = row.value and f"{row.value.p50:,.0f} verdicts/s ({row.value.p20:,.0f} to {row.value.p80:,.0f})"  # fmt: skip
        print(f"{row.case['answers']:9} {band or 'WRONG'}, {row.info['verdicts_per_cpu_second']:,.0f} per CPU second")  # fmt: skip
    return finish(args.json, rows)


def measure(
    kind: str, make: Callable[[int, int], list[Case]], size: int, workers: int, rounds: int
) -> Row:
    """Return the row of one kind of answers, after a round that starts the workers and fills their parsers' caches."""
    scorer = Scorer("bench", workers=workers)
    rates, cpu, correct = [], [], True
    for number in range(rounds + 1):
        cases = make(size, number)
        before, began = cpu_seconds(), time.perf_counter()
        waiting = [scorer.start(item) for item, _ in cases]
        scores = [wait().value for wait in waiting]
        rates.append(size / (time.perf_counter() - began))
        cpu.append(cpu_seconds() - before)
        correct &= scores == [score for _, score in cases]
    per_cpu_second = rounds * size / sum(cpu[1:])
    return Row(
        bench="verifier", case={"answers": kind, "workers": workers, "amount": size}, provider="phimini",
        unit="verdicts/s", samples=rates[1:] if correct else [], correct=correct,
        info={"cpu_seconds": cpu[1:], "verdicts_per_cpu_second": per_cpu_second},
    )  # fmt: skip


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of all below it."""
    own = psutil.Process()
    return sum(
        sum(process.cpu_times()[:4]) for process in (own, *own.children(recursive=True))
    ) - sum(own.cpu_times()[2:4])  # children that ended are counted by whoever waited for them


def integers(size: int, seed: int) -> list[Case]:
    """Return answers of a short sentence with a boxed integer."""
    rng = random.Random(seed)
    cases = []
    for i in range(size):
        if i % GROUP == 0:
            answer = rng.randrange(-(10**6), 10**6)
        given = answer + i % 2
        text = (
            f"<think>\n{answer} = {given}?\n</think>Both numbers together are $\\boxed{{{given}}}$."
        )
        cases.append((Answered("What is the sum?", str(answer), text, "stop"), 1.0 - i % 2))
    return cases


def expressions(size: int, seed: int) -> list[Case]:
    """Return answers with boxed expressions that only math-verify compares, in rising numbers, so that each comes once."""
    count = -(-size // GROUP)
    first = 2 + seed * (count + 1)
    cases = []
    for number, (n, m) in enumerate(pairwise(range(first, first + count + 1))):
        answer, right, wrong = _KINDS[number % len(_KINDS)](n, m)
        for text, score in (*((t, 1.0) for t in right), *((t, 0.0) for t in wrong)):
            cases.append((Answered("Solve it.", answer, f"So it is $\\boxed{{{text}}}$.", "stop"), score))  # fmt: skip
    return cases[:size]


Spelled = tuple[str, list[str], list[str]]
"""an answer, and right and wrong ones: GROUP together"""


def _root(n: int, m: int) -> Spelled:
    right = [rf"\sqrt{{{7 * n * n}}}", rf"\sqrt 7 \cdot {n}", rf"{n}\cdot\sqrt{{7}}", rf"\frac{{{7 * n}}}{{\sqrt{{7}}}}"]  # fmt: skip
    wrong = [rf"{m}\sqrt{{7}}", rf"\sqrt{{{7 * n * n + 1}}}", rf"-{n}\sqrt{{7}}", rf"{n}\sqrt{{5}}"]
    return rf"{n}\sqrt{{7}}", right, wrong


def _pi(n: int, m: int) -> Spelled:
    right = [rf"\frac{{{n}}}{{{m}}}\pi", rf"{n}\pi/{m}", rf"\pi\cdot\frac{{{n}}}{{{m}}}", rf"\dfrac{{\pi {n}}}{{{m}}}"]  # fmt: skip
    wrong = [rf"\frac{{{m}\pi}}{{{n}}}", rf"\frac{{{n}}}{{{m}\pi}}", rf"{n}\pi", rf"\frac{{{n}\pi^2}}{{{m}}}"]  # fmt: skip
    return rf"\frac{{{n}\pi}}{{{m}}}", right, wrong


def _polynomial(n: int, m: int) -> Spelled:
    right = [f"(x+{n})(x+{m})", f"(x+{m})(x+{n})", f"{n * m}+{n + m}x+x^2", f"x(x+{n + m})+{n * m}"]
    wrong = [f"(x-{n})(x-{m})", f"x^2+{n * m}x+{n + m}", f"(x+{n})(x-{m})", f"x^2+{n + m}x"]
    return f"x^2+{n + m}x+{n * m}", right, wrong


def _pair(n: int, m: int) -> Spelled:
    right = [rf"({n}, \frac{{1}}{{{m}}}\pi)", rf"\left({n}, \pi/{m}\right)", rf"({n}.0, \frac{{\pi}}{{{m}}})", rf"({n}, \frac{{2\pi}}{{{2 * m}}})"]  # fmt: skip
    wrong = [rf"({m}, \frac{{\pi}}{{{m}}})", rf"(\frac{{\pi}}{{{m}}}, {n})", rf"({n}, \frac{{\pi}}{{{n}}})", rf"({n}, {m}\pi)"]  # fmt: skip
    return rf"({n},\frac{{\pi}}{{{m}}})", right, wrong


_KINDS = (_root, _pi, _polynomial, _pair)


if __name__ == "__main__":
    sys.exit(main())
