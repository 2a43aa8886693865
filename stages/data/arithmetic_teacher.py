"""Plans of arithmetic, and the demo's teacher, who writes them out and sometimes makes a mistake.

A plan is a tuple of steps on numbers and on results of earlier steps. The teacher writes each operation as a line, done

    in the head   47+38=85
    in columns    47+38:7+8=15,4+3+1=8;85      (units first, carries added, the result after the semicolon)

Mistakes happen only in the head, and later lines continue from the wrong result. So a problem's rollouts differ, some
are wrong, and a long one is more often right.
"""

import random
from typing import Literal, NamedTuple

Op = Literal["+", "-", "*", "quotient", "remainder"]
SYMBOLS: dict[Op, str] = {"+": "+", "-": "-", "*": "*", "quotient": "/", "remainder": "/"}
SLIPS = (-10, -2, -1, 1, 2, 10)


class Ref(NamedTuple):
    """The result of an earlier step of the same plan."""

    step: int


class Step(NamedTuple):
    """One operation of a plan."""

    op: Op
    left: int | Ref
    right: int | Ref


Plan = tuple[Step, ...]


def carry_out(plan: Plan) -> int:
    """Return the plan's last result, exactly."""
    results: list[int] = []
    for op, left, right in plan:
        results.append(_apply(op, _resolve(left, results), _resolve(right, results)))
    return results[-1]


def work_aloud(
    plan: Plan, rng: random.Random, *, quick: float, slip: float
) -> tuple[list[str], int]:
    """Return the lines that the teacher writes and the result that she arrives at, right or not.

    quick: the share of operations done in the head, drawn for each; facts of one digit always are.
    slip: the share of those in the head (facts excepted) that come out wrong.
    """
    lines: list[str] = []
    results: list[int] = []
    for op, left, right in plan:
        a, b = _resolve(left, results), _resolve(right, results)
        results.append(_work_out(op, a, b, lines, rng, quick, slip))
    return lines, results[-1]


def _apply(op: Op, a: int, b: int) -> int:
    match op:
        case "+":
            return a + b
        case "-":
            return a - b
        case "*":
            return a * b
        case "quotient":
            return a // b
        case "remainder":
            return a % b


def _resolve(operand: int | Ref, results: list[int]) -> int:
    return results[operand.step] if isinstance(operand, Ref) else operand


def _work_out(
    op: Op, a: int, b: int, lines: list[str], rng: random.Random, quick: float, slip: float
) -> int:
    """Append the lines of one operation to `lines`; return its result as the teacher computes it."""
    if op == "*" and a < b:
        a, b = b, a
    in_head = _is_fact(op, a, b) or rng.random() < quick
    if not in_head and op == "*" and b > 9:
        units = _work_out("*", a, b % 10, lines, rng, quick, slip)
        tens = _work_out("*", a, b // 10, lines, rng, quick, slip)
        return _work_out("+", 10 * tens, units, lines, rng, quick, slip)
    result = _apply(op, a, b)
    if in_head and not _is_fact(op, a, b) and rng.random() < slip:
        result = _slip(op, result, b, rng)
    shown = str(result)
    if op in ("quotient", "remainder"):
        other = _apply("remainder" if op == "quotient" else "quotient", a, b)
        shown = f"{result}r{other}" if op == "quotient" else f"{other}r{result}"
    question = f"{a}{SYMBOLS[op]}{b}"
    lines.append(
        f"{question}={shown}" if in_head else f"{question}:{','.join(_columns(op, a, b))};{shown}"
    )
    return result


def _is_fact(op: Op, a: int, b: int) -> bool:
    """Return True for an operation known by heart: one digit each, or the times table backwards.

    Also for negative numbers, which have no columns; only an earlier slip produces them.
    """
    if min(a, b) < 0 or (op == "-" and a < b):
        return True
    return a < 10 * b if op in ("quotient", "remainder") else max(a, b) < 10


def _slip(op: Op, result: int, b: int, rng: random.Random) -> int:
    """Return a wrong result near the right one, at least 1 (or a possible remainder), so that the plan can continue."""
    if op == "remainder":
        return rng.choice([r for r in range(b) if r != result])
    return rng.choice([result + d for d in SLIPS if result + d >= 1])


def _columns(op: Op, a: int, b: int) -> list[str]:
    """Return the digit-by-digit sums of one written operation, all of them true."""
    match op:
        case "+":
            return _add_columns(a, b)
        case "-":
            return _subtract_columns(a, b)
        case "*":
            return _multiply_columns(a, b)
        case _:
            return _divide_columns(a, b)


def _add_columns(a: int, b: int) -> list[str]:
    steps, carry = [], 0
    for i in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**i % 10, b // 10**i % 10
        steps.append(f"{x}+{y}" + (f"+{carry}" if carry else "") + f"={x + y + carry}")
        carry = (x + y + carry) // 10
    return steps


def _subtract_columns(a: int, b: int) -> list[str]:
    steps, borrow = [], 0
    for i in range(len(str(a))):
        x, y = a // 10**i % 10 - borrow, b // 10**i % 10
        borrow = int(x < y)
        steps.append(f"{x + 10 * borrow}-{y}={x + 10 * borrow - y}")
    return steps


def _multiply_columns(a: int, b: int) -> list[str]:
    steps, carry = [], 0
    for digit in reversed(str(a)):
        product = int(digit) * b + carry
        steps.append(f"{digit}*{b}" + (f"+{carry}" if carry else "") + f"={product}")
        carry = product // 10
    return steps


def _divide_columns(a: int, b: int) -> list[str]:
    steps, rest = [], 0
    for digit in str(a):
        part = 10 * rest + int(digit)
        if steps or part >= b:
            steps.append(f"{part}/{b}={part // b}r{part % b}")
        rest = part % b
    return steps
