"""The audit of a run's verdicts: which ones are checked a second time, their counts, and the list for the pages.

The second check is `verify/audit.py`. Whether a verdict is audited follows from its row's id and the run's seed, so that it
is the same on every rank and in every repetition.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from phimini.model.io.json_files import Row, write_json
from phimini.stages.data.packing import derive
from phimini.stages.run.stage_folder import Stage

END = 600
"""characters of a response that are listed, its last ones"""


class Audited(NamedTuple):
    """Both verdicts on one answer."""

    is_right: bool | None
    """None for a score of the user's function, which is no verdict"""
    second: str
    """right, wrong or undecided"""

    @property
    def disagree(self) -> bool:
        """True if both verdicts are there and differ."""
        decided = self.is_right is not None and self.second != "undecided"
        return decided and self.is_right != (self.second == "right")


def is_audited(seed: int, share: float, *names: str | int) -> bool:
    """Return True for `share` of all names."""
    return derive(seed, "audit", *names) < share * 2**63


def audit_counts(pairs: Sequence[Audited]) -> dict[str, Any]:
    """Return how many verdicts were audited, how many of these the second check decided and called right, and how many disagree.

    The accuracy is the share that it calls right of those that it decided; None without one.
    """
    decided = sum(both.second != "undecided" for both in pairs)
    right = sum(both.second == "right" for both in pairs)
    return {
        "audited": len(pairs),
        "decided": decided,
        "right": right,
        "disagree": sum(both.disagree for both in pairs),
        "accuracy": right / decided if decided else None,
    }


def audit_of(rows: Sequence[tuple[Row, Audited]]) -> dict[str, Any]:
    """Return the counts, and a row for each disagreement. A row given has id, question, answer and response."""
    listed = [
        {name: row[name] for name in ("id", "question", "answer")}
        | {"response_end": row["response"][-END:], "verdict": both.is_right, "second": both.second}
        for row, both in rows
        if both.disagree
    ]
    return audit_counts([both for _, both in rows]) | {"disagreements": listed}


def write_audit(stage: Stage, name: str, rows: Sequence[tuple[Row, Audited]]) -> None:
    """Write `audit_of` the rows into the stage's `audits/NAME.json`, if there are any. One rank calls it."""
    if rows:
        file = f"audits/{name}.json"
        (stage.path / "audits").mkdir(exist_ok=True)
        write_json(stage.path / file, audit_of(rows))
        stage.note(file)
