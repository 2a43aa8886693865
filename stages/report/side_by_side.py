"""Two runs side by side: the settings that differ, the scores with their paired difference, the curves in one chart."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from phimini.model.io.checked_files import read_sealed
from phimini.model.io.json_files import Row, read_rows, write_text
from phimini.stages.report.alarms import ALARM
from phimini.stages.report.figures import Chart, Series, curves
from phimini.stages.report.formats import spaced
from phimini.stages.report.intervals import paired_gain
from phimini.stages.report.page import (
    CURVES,
    FOLDED,
    NOT_CURVES,
    points_of,
    stage_name,
    with_metrics,
)
from phimini.stages.report.template import render

RESULTS = "results.json"


class Run(NamedTuple):
    """A run's files."""

    name: str
    results: Row
    stages: dict[str, Row]
    """rows of results.json by stage"""
    means: dict[str, list[float]]
    """accuracy of each held-out problem by stage"""
    heldout: Row
    """description of the file of those problems"""
    metrics: dict[str, list[Row]]


def compare_runs(before: str, after: str, page: str) -> None:
    """Print the differences of two runs' settings and scores, and write them with the curves to the file `page`.

    Raises ValueError or FileNotFoundError that names a file that is missing or damaged.
    """
    a, b = _read(before), _read(after)
    settings = list(differences(a.results.get("config", {}), b.results.get("config", {})))
    for name, x, y in settings:
        print(f"other settings: {name} {x} and {y}")
    scores = scores_of(a, b)
    for row in scores:
        text = " -> ".join(f"{value:.3f}" for value in row["means"])
        if row["gain"]:
            gain, low, high = (100 * x for x in row["gain"])
            text += f": {gain:+.2f} [{low:+.2f}, {high:+.2f}] points, paired by problem, 95 %"
        print(f"{row['stage']}: mean@8 {text}")
    if a.heldout != b.heldout:
        print("other held-out problems: no paired differences")
    stages = [name for name in a.metrics if name in b.metrics]
    html = render(
        "side_by_side.html.j2",
        runs=(a, b),
        settings=settings,
        scores=scores,
        paired=a.heldout == b.heldout,
        curves={stage_name(name): overlaid(a, b, name) for name in stages},
        stage_name=stage_name,
    )
    write_text(page, html)
    print(page)


def _read(folder: str) -> Run:
    run = Path(folder)
    results = read_sealed(run / RESULTS)
    stages = {row["stage"]: row for row in results["stages"]}
    means = {s: read_sealed(run / "evaluate" / f"{s}.json")["per_problem_mean"] for s in stages}
    heldout = read_sealed(run / "distill" / "summary.json")["files"]["heldout.jsonl"]
    metrics = {
        name: read_rows(run / name / "metrics.jsonl", {"step": int})
        for name in with_metrics(run, list(stages))
    }
    return Run(folder, results, stages, means, heldout, metrics)


def differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:  # fmt: skip
    """Yield (name, value of a, value of b) of each setting, at any depth, that differs."""
    for key in dict.fromkeys((*a, *b)):
        x, y = a.get(key), b.get(key)
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            yield from differences(x, y, f"{prefix}{key}.")
        elif x != y and (prefix or key != "out"):
            yield f"{prefix}{key}", x, y


def scores_of(a: Run, b: Run) -> list[Row]:
    """Return the scores of the stages that both runs have, with the paired gain if their problems are the same."""
    return [
        {
            "stage": stage,
            "rows": (a.stages[stage], b.stages[stage]),
            "means": [run.stages[stage]["mean_at_8"] for run in (a, b)],
            "gain": paired_gain(a.means[stage], b.means[stage]) if a.heldout == b.heldout else None,
        }
        for stage in a.stages
        if stage in b.stages
    ]


def overlaid(a: Run, b: Run, stage: str) -> list[Chart]:
    """Return a chart of each field of a stage's logs, with a line for each run."""
    both = [run.metrics[stage] for run in (a, b)]
    titles = {fields[0]: title for title, fields in CURVES if len(fields) == 1}
    known = [field for _, fields in CURVES for field in fields]
    found = {field for rows in both for row in rows for field in row}
    others = sorted(found - {*known, *FOLDED, *NOT_CURVES})
    charts = []
    for field in [field for field in (*known, *others, *FOLDED) if not field.startswith(ALARM)]:
        lines = [
            Series(run.name, points_of(rows, field), colour)
            for run, rows, colour in zip((a, b), both, ("c1", "c2"), strict=True)
        ]
        drawn = [one for one in lines if any(y == y for _, y in one.points)]
        if drawn:
            title = titles.get(field, spaced(field).capitalize())
            legend = [(one.colour, one.name) for one in drawn]
            charts.append(Chart(title, curves(drawn), f"{spaced(field)} of both runs", legend=legend))  # fmt: skip
    return charts
