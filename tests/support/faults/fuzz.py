"""The loop of the fuzz tests: random cases from committed seeds, each under a time limit, with the outcomes counted."""

import collections
import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

LIMIT_S = 10
"""of processor time, so that other load on the machine fails no case"""
HANG_S = 120
MAX_CHARACTERS = 2000
"""of an error's message, beside the paths in it"""
ROOT = str(Path(__file__).resolve().parents[3])

TEXTS = [
    "", " ", "a", "What is 1+1?", "What is 2+3?", r"\boxed{2}", r"x \boxed{1/2}", r"\boxed{", "\u2028", "\x00", "\ud800", "😀" * 50,
    "1" * 5000, "<|end|>", "<|endoftext|>", "<|user|>", "é\u0301", "p1", "p2", "../../x", "\r\n", "9" * 20, "٣", "１",
]  # fmt: skip
NUMBERS = [0, 1, 2, 3, 7, -1, 2**31, 2**63, 2**64, 10**6, 10**9, 10**30, 10**400, 0.5, 1.0, 1.5, -1.5, -0.0, 1e308, float("inf"), float("nan")]  # fmt: skip
OTHERS = [True, False, None, [], {}, [1], [1.0] * 3, ["a"] * 3, [None] * 3, {"a": 1}]


class TooSlow(BaseException):
    """Exception of a case that exceeds a limit; no handler in the product catches it."""


def text(rng: random.Random) -> str:
    """Return one of `TEXTS`, or up to 30 random characters of all planes."""
    if rng.random() < 0.6:
        return rng.choice(TEXTS)
    ranges = ((32, 127), (1, 0x2FFF), (0x10000, 0x10FFFF))
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randint(0, 30)))


def value(rng: random.Random, depth: int = 0) -> Any:
    """Return a random JSON value, nested up to three levels."""
    kind = rng.random()
    if kind < 0.3:
        return text(rng)
    if kind < 0.6:
        return rng.choice(NUMBERS)
    if kind < 0.8 or depth == 3:
        return rng.choice(OTHERS)
    if kind < 0.9:
        return [value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    return {text(rng): value(rng, depth + 1) for _ in range(rng.randint(0, 3))}


def fuzz(name: str, number: int, case: Callable[[random.Random], str]) -> collections.Counter:
    """Run `case` on `number` generators seeded by name and index; print and return the counts of what it returns.

    ValueError and OSError are counted too: their message must be one line that any terminal can show. Raises
    AssertionError with the first seed of each other exception, and of each case that takes more than `LIMIT_S` of
    processor time or `HANG_S` on the clock.
    """
    counts: collections.Counter = collections.Counter()
    faults: dict[str, str] = {}
    slowest, started = (0.0, 0.0, -1), time.perf_counter()
    before = {sent: signal.signal(sent, _too_slow) for sent in (signal.SIGPROF, signal.SIGALRM)}
    try:
        for index in range(number):
            begun, cpu = time.perf_counter(), time.process_time()
            signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
            signal.setitimer(signal.ITIMER_REAL, HANG_S)
            try:
                counts[_outcome(case, random.Random(f"{name} {index}"))] += 1
            except (Exception, TooSlow) as error:
                place = _place(error.__cause__ or error)
                faults.setdefault(place, f"case {index}: {error!r:.300}")
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.setitimer(signal.ITIMER_REAL, 0)
            taken = (time.perf_counter() - begun, time.process_time() - cpu, index)
            slowest = max(slowest, taken)
    finally:
        for sent, handler in before.items():
            signal.signal(sent, handler)
    seconds = time.perf_counter() - started
    print(
        f"\n{name}: {number:,} cases in {seconds:.0f} s, slowest case {slowest[2]} in {slowest[0]:.2f} s ({slowest[1]:.2f} s of processor), {len(faults)} faults: "
        + ", ".join(f"{outcome} {count:,}" for outcome, count in sorted(counts.items()))
    )
    assert not faults, faults
    return counts


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise TooSlow


def _outcome(case: Callable[[random.Random], str], rng: random.Random) -> str:
    try:
        return case(rng)
    except (ValueError, OSError) as error:
        if flaw := _flaw(str(error)):
            raise AssertionError(f"{flaw}: {error}") from error
        return "ValueError" if isinstance(error, ValueError) else type(error).__name__


def _flaw(message: str) -> str | None:
    """Return why a message is no line for a terminal, or None."""
    if not message or "\n" in message:
        return "not one line"
    try:
        message.encode()
    except UnicodeEncodeError:
        return "not UTF-8"
    return "too long" if len(message) > MAX_CHARACTERS else None


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename.startswith(ROOT) and "/.venv/" not in f.filename]
    last = (own or frames)[-1]
    return f"{type(error).__name__} at {os.path.relpath(last.filename, ROOT)}:{last.lineno}"
