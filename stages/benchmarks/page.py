"""The page of an evaluation, `benchmarks.html`: its scores beside the published ones, in one file that needs no other."""

from pathlib import Path
from typing import Any

from phimini.model.io.checked_files import read_sealed
from phimini.model.io.json_files import write_text
from phimini.stages.benchmarks.published import BESIDE, TABLES
from phimini.stages.benchmarks.questions import BENCHMARKS
from phimini.stages.benchmarks.scores import RESULTS, RULES
from phimini.stages.report.figures import Chart, Rung, Series, curves, ladder
from phimini.stages.report.page import PAPER, SHORT_NAMES, stage_name
from phimini.stages.report.template import render

STAGES = list(PAPER)
_LINES = {"aime24": ("AIME 24", "c1"), "aime25": ("AIME 25", "c4"), "math500": ("MATH-500", "c3"), "gpqa_diamond": ("GPQA", "c2"), "gsm8k": ("GSM8K", "c0")}  # fmt: skip
"""short title and colour of each benchmark in a ladder"""


def write_page(out: Path, results: dict[str, Any]) -> None:
    """Write `out`/benchmarks.html from the content of benchmarks.json, and of those of the models beside it."""
    models = neighbours(out, results)
    page = render(
        "benchmarks.html.j2",
        results=results,
        benchmarks=results["benchmarks"],
        known=BENCHMARKS,
        columns=BESIDE,
        models=models,
        tables=TABLES,
        ladders=[chart for chart in (own_ladder(models), paper_ladder()) if chart],
        pass_curves=[pass_curve(name, each) for name, each in results["benchmarks"].items()],
        stage_name=stage_name,
        audits={
            BENCHMARKS[name].title: each["audit"]
            for name, each in results["benchmarks"].items()
            if each.get("audit", {}).get("audited")
        },
    )
    write_text(out / "benchmarks.html", page)


def neighbours(out: Path, results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the benchmarks of this model and of those with results in folders beside `out`, stages in their order."""
    found = {path.parent.name: read_sealed(path) for path in sorted(out.parent.glob(f"*/{RESULTS}"))}  # fmt: skip
    found |= {out.name: results}
    order = [name for name in STAGES if name in found] + [n for n in found if n not in STAGES]
    return {name: found[name]["benchmarks"] for name in order}


def own_ladder(models: dict[str, dict[str, Any]]) -> Chart | None:
    """Return the chart of our stages, for the benchmarks that all of them have; None for fewer than two stages."""
    stages = [name for name in models if name in STAGES]
    shared = [name for name in BESIDE if all(name in models[stage] for stage in stages)]
    if len(stages) < 2 or not shared:
        return None
    rungs = lambda name: [Rung(*(100 * x for x in models[s][name]["strict"])) for s in stages]
    lines = [(*_LINES[name], rungs(name)) for name in shared]
    figure = ladder([SHORT_NAMES[stage] for stage in stages], lines)
    return Chart("These stages", figure, "scores after each stage", "mean@k by our rule; bars: 95 % interval")  # fmt: skip


def paper_ladder() -> Chart:
    """Return the chart of the paper's stages."""
    table = list(TABLES["The paper's stages"].values())
    names = list(table[0])
    lines = [(*_LINES[name], [Rung(float(row[name])) for row in table]) for name in names]
    figure = ladder([SHORT_NAMES[stage] for stage in STAGES], lines)
    return Chart("The paper's stages", figure, "the paper's scores after each stage", "pass@1, arXiv 2504.21233")  # fmt: skip


def pass_curve(name: str, of_one: dict[str, Any]) -> Chart:
    """Return the chart of pass@k by both rules."""
    series = [
        Series(rule, [(int(n), 100 * each[rule][0]) for n, each in of_one["pass_at"].items()], f"c{i + 1}")
        for i, rule in enumerate(RULES)
    ]  # fmt: skip
    legend = [(one.colour, one.name) for one in series]
    return Chart(f"{BENCHMARKS[name].title}, pass@k in percent", curves(series, "k"), f"pass@k of {name}", "", legend)  # fmt: skip
