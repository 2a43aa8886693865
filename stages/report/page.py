"""The report of a run: everything in its directory on one page, `report.html`, that needs no other file.

Reads results.json, evaluate/STAGE.json, STAGE/metrics.jsonl, the data sets and, if it exists, controls/controls.json.
"""

from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any

from phimini.model.io.checked_files import check_file, read_sealed
from phimini.model.io.json_files import Row, read_json, read_rows, write_text
from phimini.stages.report.alarms import ALARM, alarms, num_updates
from phimini.stages.report.datasets import LENGTHS, described, write_pages
from phimini.stages.report.figures import Chart, Rung, Series, counts, curves, gains, ladder, times
from phimini.stages.report.formats import duration, minus, short, spaced
from phimini.stages.report.template import render
from phimini.stages.run.status import last_rows

STAGE_NAMES = {
    "base": "Base",
    "midtrain": "Mid-training",
    "sft": "SFT",
    "rollout_dpo": "Rollout DPO",
    "rlvr": "RL",
}
SHORT_NAMES = STAGE_NAMES | {"midtrain": "Mid-train", "rollout_dpo": "DPO"}
# Phi-4-Mini-Reasoning after each stage, pass@1 in percent (arXiv 2504.21233): AIME 2024, MATH-500, GPQA Diamond.
PAPER = {
    "base": (10.0, 71.8, 36.9),
    "midtrain": (30.0, 82.9, 42.6),
    "sft": (43.3, 89.3, 48.3),
    "rollout_dpo": (50.0, 93.6, 49.0),
    "rlvr": (57.5, 94.6, 52.0),
}
# Charts in this order: title, fields drawn together. Other fields of a metrics.jsonl follow.
CURVES = [
    ("Loss", ["loss"]),
    ("Validation loss", ["validation_loss"]),
    ("Reward", ["reward"]),
    ("Response length, tokens", ["response_length"]),
    ("Entropy, nats", ["entropy"]),
    ("Preference loss, ln 2 at first", ["preference_loss"]),
    ("Implicit rewards", ["chosen_reward", "rejected_reward"]),
    ("Margin", ["margin"]),
    ("Preference accuracy", ["preference_accuracy"]),
    ("NLL of the chosen answer", ["chosen_nll"]),
    ("Groups with one reward only", ["zero_groups"]),
    ("Truncated responses", ["truncated"]),
    ("Sampling temperature", ["temperature"]),
]
# Folded away: of interest when something went wrong.
FOLDED = ["accuracy", "grad_norm", "lr", "tokens_per_second"]
NOT_CURVES = {"step", "tokens", "seconds", "skipped"}
_NOW_AND_THEN = {"validation_loss"}
"""fields that not every step has; a step without another field is a gap in its curve"""
RL_PHASES = {"sampling": "rollout", "verdicts": "verify", "sync": "sync", "data": "data"}
STAGE_OF = {"midtrain": "midtrain", "sft": "sft", "pairs": "rollout_dpo", "prompts": "rlvr"}
"""the stage that is trained on each data set"""


_NUMERALS = {1: "one stage", 2: "two stages", 3: "three stages", 4: "four stages"}


def write_report(run_dir: str | Path, state: str = "") -> None:
    """Write `run_dir`/report.html, also of a run without results yet, and the pages of its data sets.

    state: a sentence about a run that is not complete. Raises ValueError that names a damaged file.
    """
    run = Path(run_dir)
    results = results_of(run)
    stages = results["stages"]
    names = [row["stage"] for row in stages]
    evaluations = {name: read_sealed(run / "evaluate" / f"{name}.json") for name in names}
    metrics = {
        name: read_rows(run / name / "metrics.jsonl", {"step": int})
        for name in with_metrics(run, names)
    } | {
        name: rows
        for name in STAGE_NAMES
        if name not in names and (rows := last_rows(run / name / "metrics.jsonl", None))
    }
    controls = run / "controls" / "controls.json"
    run_name = name_of(run, results)
    sets = described(run) if (run / "curate" / "summary.json").exists() else {}
    write_pages(run, run_name, sets)
    intervals = [row["gain_ci95"] for row in stages if row["gain_ci95"] is not None]
    page = render(
        "report.html.j2",
        stage_name=stage_name,
        short_name=short_name,
        state=state,
        run_name=run_name,
        results=results,
        stages=stages,
        length=_NUMERALS.get(len(stages) - 1, f"{len(stages) - 1} stages"),
        num_gains=len(intervals),
        num_sure=sum(low > 0 for low, _ in intervals),
        facts=facts(results),
        updates={name: num_updates(rows) for name, rows in metrics.items()},
        alarms=alarms(run, metrics),
        trained_on=trained_on(run, sets),
        rl_time=rl_time(metrics.get("rlvr", [])),
        ladder=ladder_charts(stages) if stages else [],
        paper=PAPER,
        controls=read_sealed(controls) if controls.exists() else None,
        breakdowns=breakdowns(evaluations),
        curves=[stage_curves(name, rows) for name, rows in metrics.items()],
        samples=samples(evaluations),
        audits=audits(run, evaluations),
    )
    write_text(run / "report.html", page)


def results_of(run: Path) -> Row:
    """Return the content of results.json, or empty results of a run on its way. Raises as `write_report`."""
    path = run / "results.json"
    results = read_sealed(path) if path.exists() else nothing_yet(run)
    expected = {"stages", "seed", "num_problems", "peak_rss_bytes", "versions"}
    if not isinstance(results, dict) or not expected <= results.keys():
        raise ValueError(f"{path}: expected an object with {sorted(expected)}, as `recipe` writes it")  # fmt: skip
    return results


def nothing_yet(run: Path) -> Row:
    """Return empty results, for a run on its way. Raises FileNotFoundError if every model is evaluated: then the file is lost."""
    if all((run / "evaluate" / f"{name}.json").exists() for name in STAGE_NAMES):
        raise FileNotFoundError(
            f"{run / 'results.json'} is missing; `phimini recipe` writes it again"
        )
    path = run / "config.json"
    config = read_json(path) if path.exists() else {}
    return {"stages": [], "seed": config.get("seed", "unknown"), "num_problems": 0, "peak_rss_bytes": 0, "versions": {}, "config": config}  # fmt: skip


def name_of(run: Path, results: Row) -> str:
    return results.get("config", {}).get("name", run.name)


def with_metrics(run: Path, stages: Sequence[str]) -> list[str]:
    """Return the stages whose summary.json describes a metrics file. Raises ValueError if that file is damaged or lost."""
    found = []
    for stage in stages:
        files = read_sealed(run / stage / "summary.json")["files"]
        if "metrics.jsonl" in files:
            check_file(run / stage / "metrics.jsonl", files["metrics.jsonl"])
            found.append(stage)
    return found


def facts(results: Row) -> dict[str, object]:
    """Return the figures of the page's header."""
    return {
        "Date": results.get("date", "unknown"),
        "Machine": results.get("machine", "unknown"),
        "From data to report": duration(results.get("wall_seconds")),
        "Peak memory": f"{results['peak_rss_bytes'] / 2**30:.2f} GiB",
        "Seed": results["seed"],
        "Held-out problems": f"{results['num_problems']:,}",
    }


def ladder_charts(stages: Sequence[Row]) -> list[Chart]:
    """Return the accuracy of each stage, the paper's, the gains and the times."""
    labels = [short_name(row["stage"]) for row in stages]
    rungs = lambda key, ci=None: [
        Rung(100 * row[key], *(100 * x for x in (row[ci] if ci else ()))) for row in stages
    ]
    ours = [("mean@8", "c1", rungs("mean_at_8", "ci95")), ("greedy", "c3", rungs("greedy")),
            ("pass@8", "c0", rungs("pass_at_8"))]  # fmt: skip
    charts = [
        Chart(
            "This run, held-out problems",
            ladder(labels, ours),
            "accuracy after each stage",
            "bars: 95 % interval",
        )  # fmt: skip
    ]
    if [row["stage"] for row in stages] == list(PAPER):
        paper = [
            (name, colour, [Rung(values[index]) for values in PAPER.values()])
            for index, (name, colour) in enumerate(
                [("AIME 24", "c1"), ("MATH-500", "c3"), ("GPQA", "c2")]
            )  # fmt: skip
        ]
        charts.append(Chart("The paper, Phi-4-Mini 3.8 B", ladder(labels, paper), "the paper's accuracies", "pass@1, arXiv 2504.21233"))  # fmt: skip
    gained = [
        (label, 100 * row["gain"], *(100 * x for x in row["gain_ci95"]))
        for label, row in zip(labels, stages, strict=True)
        if row["gain"] is not None
    ]
    if gained:
        charts.append(Chart("What each stage adds, points of mean@8", gains(gained), "gain of each stage with its 95 % interval", "paired by problem, 95 % interval"))  # fmt: skip
    spent = []
    for label, row in zip(labels, stages, strict=True):
        evaluation = row.get("evaluation_seconds", 0.0)
        spent.append((label, (row["seconds"], evaluation), duration(row["seconds"] + evaluation)))
    charts.append(time_chart("Where the time went", spent, [("training", "c1", 0.85), ("evaluation", "c0", 0.45)], "time of training and evaluation of each stage"))  # fmt: skip
    return charts


def time_chart(
    title: str,
    rows: Sequence[tuple[str, Sequence[float], str]],
    parts: Sequence[tuple[str, str, float]],
    label: str,
) -> Chart:
    """Return the chart of `figures.times`, with the legend of its parts."""
    return Chart(title, times(rows, parts), label, legend=[(colour, name) for name, colour, _ in parts])  # fmt: skip


def rl_time(rows: Sequence[Row]) -> Chart | None:
    """Return stage 4's time by phase, apart for steps with and without an update; None for a log without phases."""
    if not any("rollout_seconds" in row for row in rows):
        return None
    spent = dict.fromkeys((*RL_PHASES, "training"), (0.0, 0.0))
    for row in rows:
        updated = num_updates([row])
        own = {name: row.get(f"{phase}_seconds", 0.0) for name, phase in RL_PHASES.items()}
        for name, seconds in (own | {"training": row["seconds"] - sum(own.values())}).items():
            with_update, without = spent[name]
            spent[name] = (with_update + seconds * updated, without + seconds * (1 - updated))
    bars = [(name, both, duration(sum(both))) for name, both in spent.items()]
    parts = [("steps with an update", "c1", 0.85), ("steps without", "c2", 0.7)]
    return time_chart("Where RL's time went", bars, parts, "time of stage 4 by phase")


def trained_on(run: Path, sets: Mapping[str, Row]) -> list[dict[str, Any]]:
    """Return, for each stage with a data set, its counts, the chart of its lengths, and the paths of its pages."""
    found = []
    for name, of_one in sets.items():
        stage = STAGE_OF[name]
        lengths = of_one["histograms"][LENGTHS]
        pages = {"data set": f"data/{name}.html"}
        if (run / stage / "metrics.jsonl").exists():
            pages["token by token"] = f"viewer/{stage}.html"
        found.append({
            "stage": stage_name(stage), "rows": of_one["facts"]["Rows"], "drops": of_one["drops"],
            "chart": Chart(f"{stage_name(stage)}: {LENGTHS[0].lower()}{LENGTHS[1:]}", counts(lengths), "lengths of answers") if lengths else None,
            "pages": pages,
        })  # fmt: skip
    return found


def breakdowns(evaluations: Mapping[str, Row]) -> list[dict[str, Any]]:
    """Return the tables of mean@8 by family and by level: a row per group, a share per stage."""
    tables = []
    for kind, title in (("families", "By family"), ("levels", "By level")):
        rows = []
        for group in dict.fromkeys(g for e in evaluations.values() for g in e.get(kind, {})):
            cells = [e.get(kind, {}).get(group) for e in evaluations.values()]
            label = f"{'Level ' if kind == 'levels' else ''}{spaced(group)}"
            size = next(cell["n"] for cell in cells if cell)
            shares = [cell and cell["mean_at_8"] for cell in cells]
            rows.append({"label": label, "n": size, "shares": shares})
        if rows:
            tables.append({"title": title, "rows": rows})
    return tables


def stage_curves(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Return a stage's charts, those of most interest first and the others folded."""
    known = [field for _, fields in CURVES for field in fields]
    fields = {field for row in rows for field in row if not field.startswith(ALARM)}
    others = sorted(fields - {*known, *FOLDED, *NOT_CURVES})
    shown = [curve_chart(title, fields, rows) for title, fields in CURVES]
    folded = [curve_chart(spaced(f).capitalize(), [f], rows) for f in others + FOLDED]
    return {
        "name": stage_name(name),
        "shown": [chart for chart in shown if chart],
        "folded": [chart for chart in folded if chart],
    }


def curve_chart(title: str, fields: Sequence[str], rows: Sequence[Row]) -> Chart | None:
    """Return a chart of `fields` over the steps, or None if no row has any of them."""
    series = []
    for index, field in enumerate(fields):
        points = points_of(rows, field)
        if any(y == y for _, y in points):
            series.append(Series(spaced(field), points, f"c{index + 1}"))
    if not series:
        return None
    values = [y for _, y in series[0].points if y == y]
    scale = max(map(abs, values))
    note = f"{short(values[0], scale)} → {short(values[-1], scale)}"
    legend = [(one.colour, one.name) for one in series] if len(fields) > 1 else []
    if fields == ["validation_loss"] and len(values) >= 4 and values[-1]:
        quarter = values[-1 - len(values) // 4]
        note += minus(f", last quarter {100 * (values[-1] - quarter) / quarter:+.1f} %")
    label = f"{', '.join(one.name for one in series)} over the steps"
    return Chart(title, curves(series), label, "" if legend else note, legend)


def points_of(rows: Sequence[Row], field: str) -> list[tuple[float, float]]:
    """Return a field over the steps; NaN, a gap, where a step has no number that a chart can show."""
    points = [(row["step"] + 1, float(row[field]) if _is_number(row.get(field)) else nan) for row in rows]  # fmt: skip
    return [(x, y) for x, y in points if y == y or field not in _NOW_AND_THEN]


def samples(evaluations: Mapping[str, Row]) -> dict[str, list[Row]]:
    """Return each question's answers, first stage to last."""
    asked: dict[str, list[Row]] = {}
    for name, evaluation in evaluations.items():
        for sample in evaluation.get("samples", []):
            asked.setdefault(sample["question"], []).append({"stage": name, "sample": sample})
    return asked


def audits(run: Path, evaluations: Mapping[str, Row]) -> dict[str, Row]:
    """Return the counts of the second check and the verdicts that disagree, by the answers that they are on."""
    found = {}
    for stage, evaluation in evaluations.items():
        parts = [read_json(path) for path in sorted((run / stage / "audits").glob("*.json"))]
        if parts:
            counts = {key: sum(part[key] for part in parts) for key in ("audited", "decided", "right", "disagree")}  # fmt: skip
            rows = [row for part in parts for row in part["disagreements"]]
            found[f"{stage_name(stage)}, rollouts"] = counts | {"disagreements": rows}
        if evaluation.get("audit", {}).get("audited"):
            found[f"{stage_name(stage)}, evaluation"] = evaluation["audit"]
    return found


def stage_name(stage: str) -> str:
    return STAGE_NAMES.get(stage, stage)


def short_name(stage: str) -> str:
    return SHORT_NAMES.get(stage, stage)


def _is_number(value: object) -> bool:
    """Return True for a number that a chart can show: JSON's 1e999 reads as infinity, and charts hold float32."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e30
