"""The steps that `distill` and `clean` share: generators over pairs of a row and the name of the set that it goes to.

A row that goes to `dropped` keeps all its fields, and gets a `reason`.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from phimini.model.io.json_files import Row
from phimini.stages.data.decontaminate import Excerpts
from phimini.stages.data.row_fields import has_ended
from phimini.stages.data.row_index import repetition
from phimini.stages.data.set_aside import Aside
from phimini.stages.verify.scorer import Answered, Scorer

BATCH = 64
"""rollouts that a process verifies at a time"""
JUDGED = "judged right"
"""the verdict on a row that the verifier marks wrong and a judge right"""
Named = tuple[str, Row]
"""a set, such as `rollouts` or `dropped`, and a row of it"""


def routed(given: Iterable[Named], aside: Aside) -> Iterator[Named]:
    """Yield each row with the set that its question is of, or `dropped`."""
    for name, row in given:
        found, question_id = aside.of(row["question"]) or (name, "")
        yield dropped(row, f"held-out question {question_id}") if found == "heldout" else (found, row)  # fmt: skip


def without_excerpts(given: Iterable[Named], excerpts: Excerpts) -> Iterator[Named]:
    """Yield the rows; those whose question quotes a held-out one are dropped."""
    for name, row in given:
        reason = None if name == "dropped" else excerpts.match(row["question"])
        yield (name, row) if reason is None else dropped(row, reason)


def dropped(row: Row, reason: str) -> Named:
    return "dropped", row | {"reason": reason}


def verified(
    given: Iterable[Named], scorer: Scorer, workers: int, *, accept_judged: bool = False
) -> Iterator[Named]:
    """Yield the rows with `correct` and the `verdict`'s reason; wrong ones of the validation set are dropped.

    workers: of the scorer. accept_judged: a judge's `right` counts where the verifier marks a row wrong.
    """
    given = iter(given)
    waiting: deque[tuple[list[Named], Callable[[], list[str]]]] = deque()
    while batch := list(islice(given, BATCH)):
        to_judge = [
            Answered(row["question"], row["answer"], row["response"], "stop" if has_ended(row) else "length")
            for name, row in batch
            if name != "dropped"
        ]  # fmt: skip
        waiting.append((batch, scorer.reasons(to_judge)))
        if len(waiting) > 2 * workers:
            yield from _with_verdicts(*waiting.popleft(), accept_judged)
    for each in waiting:
        yield from _with_verdicts(*each, accept_judged)


def _with_verdicts(
    batch: list[Named], wait: Callable[[], list[str]], accept_judged: bool
) -> Iterator[Named]:
    reasons = iter(wait())
    for name, row in batch:
        if name == "dropped":
            yield name, row
            continue
        reason = next(reasons)
        judge = row.get("judge")
        if accept_judged and reason != "equal" and isinstance(judge, dict) and judge.get("verdict") == "right":  # fmt: skip
            reason = JUDGED
        row |= {"correct": reason in ("equal", JUDGED), "verdict": reason}
        is_unfit = name == "validation" and not row["correct"]
        yield dropped(row, f"validation, {reason}") if is_unfit else (name, row)


def without_loops(given: Iterable[Named], most: float | None) -> Iterator[Named]:
    """Yield the rows with their `repetition`, the share of sequences of words that occur again; above `most` they are dropped."""
    for name, row in given:
        row |= {"repetition": round(repetition(row["response"]), 4)}
        is_loop = name != "dropped" and most is not None and row["repetition"] > most
        yield dropped(row, "repetition") if is_loop else (name, row)
