"""The plots of `phimini bench scaling`, from its CSV files and nothing else; SVG that needs no page around it"""

import csv
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from phimini.stages.report.charts import Point, Series, line_chart

# What the report's page gives its charts.
_STYLE = """<style>
svg { background: #fff; font-family: sans-serif; }
text { fill: #5d6670; font-size: 11px; } .mid { text-anchor: middle; } .end { text-anchor: end; }
.grid { stroke: #eceff1; fill: none; } .line { fill: none; stroke-width: 1.8; } .dot { stroke: #fff; }
.line.c1 { stroke: #2458c5; } .dot.c1 { fill: #2458c5; } .line.c2 { stroke: #c2410c; } .dot.c2 { fill: #c2410c; }
.line.c3 { stroke: #0f766e; } .dot.c3 { fill: #0f766e; } .line.c4 { stroke: #7c3aed; } .dot.c4 { fill: #7c3aed; }
.title { fill: #1b1f24; font-size: 12px; }
</style>"""
_TITLE_HEIGHT = 24


def plot_scaling(source: Path, folder: Path) -> list[Path]:
    """A plot of speed, and one of memory where it was measured, per axis of scaling.csv."""
    axes: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in _read(source):
        axes[row["axis"]].append(row)
    written = []
    for axis, rows in axes.items():
        speed = [(float(r["x"]), float(r["p50"])) for r in rows]
        written.append(
            _plot(folder / f"{axis}_speed.svg", rows[0]["unit"], axis, [("speed", speed)])
        )
        memory = [(float(r["x"]), int(r["peak_bytes"]) / 2**20) for r in rows if r["peak_bytes"]]
        if memory:
            title = "MiB that a step allocates at its peak"
            written.append(_plot(folder / f"{axis}_memory.svg", title, axis, [("memory", memory)]))
    return written


def plot_gpus(source: Path, folder: Path) -> list[Path]:
    """Planned tokens/s of every stage over the number of GPUs, from gpus.csv."""
    stages: dict[str, list[Point]] = defaultdict(list)
    for row in _read(source):
        if row["batch"] == "recipe" and row["fits"] == "True":
            stages[row["stage"]].append((float(row["gpus"]), float(row["planned_tokens_per_second"])))  # fmt: skip
    title = f"tokens/s, planned, not measured: {', '.join(stages)} (blue, red, green, violet)"
    return [_plot(folder / "gpus_speed.svg", title, "gpus", list(stages.items()))]


def _plot(path: Path, title: str, x_name: str, lines: Sequence[tuple[str, Sequence[Point]]]) -> Path:  # fmt: skip
    """x doubles from mark to mark."""
    values = sorted({x for _, points in lines for x, _ in points})
    ticks = [(math.log2(x), f"{x / 1024:g}k" if x >= 1024 and x % 1024 == 0 else f"{x:g}") for x in values]  # fmt: skip
    series = [
        Series(name, [(math.log2(x), y) for x, y in points], f"c{1 + i}")
        for i, (name, points) in enumerate(lines)
    ]
    chart = line_chart(series, x_name.replace("_", " "), x_ticks=ticks, from_zero=True)
    path.write_text(_standalone(chart, title) + "\n")
    return path


def _standalone(chart: str, title: str) -> str:
    """A chart of the report as a file of its own, with its style and a title above."""
    head, body = chart.split(">", 1)
    width, height = head.split('viewBox="0 0 ')[1].split('"')[0].split()
    box = f'viewBox="0 0 {width} {height}"'
    assert box in head, head
    head = head.replace(box, f'xmlns="http://www.w3.org/2000/svg" viewBox="0 {-_TITLE_HEIGHT} {width} {float(height) + _TITLE_HEIGHT:g}"')  # fmt: skip
    return f'{head}>{_STYLE}<text class="title" x="8" y="-8">{title}</text>{body}'


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
