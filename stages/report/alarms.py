"""Lines about a run that went on although something was wrong, from the rows of its metrics."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from phimini.model.io.json_files import Row
from phimini.stages.report.formats import short, spaced

ALARM = "alarm_"
"""start of the fields that a guard adds to a step's row, with the value that it found"""


def num_updates(rows: Sequence[Row]) -> int:
    """Return the number of steps that changed the weights: those with a loss that no guard held back."""
    return sum("loss" in row and not row.get("skipped") for row in rows)


def alarms(run: Path, metrics: Mapping[str, Sequence[Row]]) -> list[tuple[str, str]]:
    """Return pairs of a stage and a sentence. metrics: rows by stage."""
    found = []
    for stage, rows in metrics.items():
        if missing := [row["step"] + 1 for row in rows if num_updates([row]) == 0]:
            found.append((stage, f"{len(missing)} of {len(rows)} steps made no update: {_places(missing)}"))  # fmt: skip
        fields = dict.fromkeys(field for row in rows for field in row)
        for field in fields:
            values = [(row["step"] + 1, row[field]) for row in rows if field in row]
            if field.startswith(ALARM):
                worst = max((x for _, x in values), key=abs)
                text = f"{spaced(field.removeprefix(ALARM))}, up to {short(worst, abs(worst))}"
                found.append((stage, f"{text}: {_places([step for step, _ in values])}"))
            elif lost := [step for step, x in values if x is None]:
                found.append((stage, f"{spaced(field)} is not a finite number: {_places(lost)}"))
        if (run / stage / "mismatch.txt").exists():
            found.append((stage, f"sampler and trainer differ: {stage}/mismatch.txt"))
    return found


def _places(steps: Sequence[int]) -> str:
    """Return the numbers of the first steps."""
    more = f" and {len(steps) - 12:,} more" if len(steps) > 12 else ""
    return f"step{'s' * (len(steps) > 1)} {', '.join(map(str, steps[:12]))}{more}"
