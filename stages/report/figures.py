"""Charts of the report as Plotly figures.

Colours are names of CSS variables, such as "var(--c1)": the page replaces them by the values of its light or dark scheme.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from markupsafe import Markup
from scipy.signal import savgol_filter

Point = tuple[float, float]

_SMOOTH_FROM = 60
"""points from which a curve gets a running mean"""
_MAX_SMOOTH_POINTS = 1000
_HALF_WINDOW = 40
"""a running mean reaches over one in so many points to each side"""


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure with its caption. `legend` is pairs of (CSS class of the colour, name), `note` follows it."""

    title: str
    figure: go.Figure
    label: str
    note: str = ""
    legend: Sequence[tuple[str, str]] = ()

    @property
    def height(self) -> int:
        """Pixels."""
        layout: Any = self.figure.layout
        return layout.height

    @property
    def json(self) -> Markup:
        """The figure for a script element: no "<" can end it."""
        return Markup((self.figure.to_json() or "").replace("<", "\\u003c"))


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart, in the colour "c1" to "c4"."""

    name: str
    points: Sequence[Point]
    colour: str = "c1"


@dataclass(frozen=True, slots=True)
class Rung:
    """One stage of a ladder: its value in percent and, if known, its 95 % interval."""

    value: float
    low: float | None = None
    high: float | None = None


def curves(series: Sequence[Series], x_name: str = "step") -> go.Figure:
    """Draw lines over the steps, or what `x_name` counts. A long one is pale, with its running mean over it.

    A point whose y is NaN is a gap; a value between two gaps is a dot.
    """
    figure = _figure(190, margin={"l": 46, "r": 12, "t": 8, "b": 24}, hovermode="x unified")
    for one in series:
        x, y = np.array(one.points, dtype=np.float64).T
        style = {"color": f"var(--{one.colour})"}
        name, there = escape(one.name), np.isfinite(y)
        long, sizes = there.sum() >= _SMOOTH_FROM, 5 if len(y) <= 12 else _dots(there)
        figure.add_scatter(
            **_steps(x), y=y.astype(np.float32), name=name, mode="lines" if sizes is None else "lines+markers",
            opacity=0.28 if long else 1.0, line={"width": 1 if long else 1.8, **style},
            marker={"size": sizes, "line": {"width": 0}, **style},
        )  # fmt: skip
        if long:
            mean = y.copy()
            mean[there] = smoothed(y[there])
            every = -(-len(y) // _MAX_SMOOTH_POINTS)
            figure.add_scatter(
                x=x[::every].astype(np.int64), y=mean[::every].astype(np.float32), name=f"{name}, mean",
                mode="lines", line={"width": 1.8, **style},
            )  # fmt: skip
    figure.update_traces(hovertemplate="%{y:.4~g}")
    every_point = np.array([point for one in series for point in one.points if np.isfinite(point[1])])  # fmt: skip
    x_range, y_range = (_padded(values, share) for values, share in zip(every_point.T, (0.01, 0.06), strict=True))  # fmt: skip
    figure.update_xaxes(
        showgrid=False, nticks=6, range=x_range, hoverformat=",d", unifiedhovertitle={"text": f"{x_name} %{{x:,d}}"},
        spikecolor="var(--faint)", spikethickness=1, spikedash="solid",
    )  # fmt: skip
    figure.update_yaxes(nticks=5, range=y_range, tickformat=_tick_format(every_point[:, 1]))
    figure.add_annotation(
        x=0, xref="paper", xanchor="right", xshift=-6, y=0, yref="paper", yanchor="top", yshift=-3, text=x_name,
        showarrow=False,
    )  # fmt: skip
    return figure


def _dots(there: np.ndarray) -> np.ndarray | None:
    """Return the size of each point's marker, 0 but between two gaps; or None if that makes no marker."""
    around = np.concatenate([[False], there, [False]])
    alone = there & ~around[:-2] & ~around[2:]
    return np.where(alone, 4, 0).astype(np.uint8) if alone.any() else None


def counts(numbers: Mapping[str, int]) -> go.Figure:
    """Draw a bar for each label, as high as its number."""
    figure = _figure(190, margin={"l": 46, "r": 12, "t": 8, "b": 48}, bargap=0.15)
    labels = [escape(label) for label in numbers]
    figure.add_bar(
        x=list(range(len(labels))), y=list(numbers.values()), customdata=labels, marker={"color": "var(--c1)"},
        hovertemplate="%{customdata}: %{y:,d}<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(tickvals=list(range(len(labels))), ticktext=labels, showgrid=False)
    figure.update_yaxes(nticks=5, tickformat="~s", rangemode="tozero")
    return figure


def smoothed(values: np.ndarray) -> np.ndarray:
    """Return a running mean: a straight line fitted to a twentieth of the curve around each point.

    It does not lag, and at the ends it follows the last window's line.
    """
    reach = max(2, len(values) // _HALF_WINDOW)
    return np.asarray(savgol_filter(values, 2 * reach + 1, polyorder=1))


def ladder(stages: Sequence[str], lines: Sequence[tuple[str, str, Sequence[Rung]]]) -> go.Figure:
    """Draw accuracies (0 to 100 %) after each stage; `lines` are (name, colour, a rung per stage).

    The first line is bold and carries its values. Intervals are pale bars.
    """
    figure = _figure(270, margin={"l": 46, "r": 84, "t": 10, "b": 28}, hovermode="x unified")
    for order, (name, colour, rungs) in reversed(list(enumerate(lines))):
        first, style = order == 0, {"color": f"var(--{colour})"}
        for index, rung in enumerate(rungs):
            if rung.low is not None and rung.high is not None:
                _bar_between(figure, [index, index], [rung.low, rung.high], style)
        figure.add_scatter(
            x=list(range(len(stages))), y=[rung.value for rung in rungs], name=escape(name),
            mode="lines+markers+text" if first else "lines+markers", opacity=1.0 if first else 0.75,
            line={"width": 2.6 if first else 1.5, **style},
            marker={"size": 9 if first else 6, "line": {"width": 1.5, "color": "var(--card)"}, **style},
            text=[f"{rung.value:.1f}" for rung in rungs], textfont={"size": 13, "color": "var(--ink)", "weight": 600},
            textposition=[_label_side(rung, [other[i] for _, _, other in lines[1:]]) for i, rung in enumerate(rungs)],
            cliponaxis=False, customdata=[_interval(rung) for rung in rungs], hovertemplate="%{y:.1f} %%{customdata}",
        )  # fmt: skip
    ends = [rungs[-1].value for _, _, rungs in lines]
    for (name, colour, _), y in zip(lines, _spread(ends, 7.5), strict=True):
        figure.add_annotation(
            x=1, xref="paper", xanchor="left", xshift=7, y=y, text=f"<b>{escape(name)}</b>", showarrow=False,
            font={"size": 12.5, "color": f"var(--{colour})"},
        )  # fmt: skip
    # Room for a label below 0 and above 100.
    ticks = [0, 25, 50, 75, 100]
    figure.update_yaxes(
        range=[-4, 104], tickvals=ticks, ticktext=[f"{t} %" for t in ticks], fixedrange=True
    )
    figure.update_xaxes(
        range=[-0.3, len(stages) - 0.8], tickvals=list(range(len(stages))), ticktext=list(map(escape, stages)),
        tickfont={"size": 12, "color": "var(--ink)"}, showgrid=False, fixedrange=True,
    )  # fmt: skip
    return figure


def gains(rows: Sequence[tuple[str, float, float, float]]) -> go.Figure:
    """Draw a row per stage: (name, gain, low, high) in percentage points, and the line of no gain."""
    figure = _figure(34 * len(rows) + 40, margin={"l": 74, "r": 136, "t": 4, "b": 30})
    for index, (name, gain, low, high) in enumerate(rows):
        colour = {"color": "var(--c1)" if low > 0 else "var(--c2)" if high < 0 else "var(--c0)"}
        text = f"{gain:+.1f} [{low:+.1f}, {high:+.1f}]".replace("-", "−")
        _bar_between(figure, [low, high], [index, index], colour)
        figure.add_scatter(
            x=[gain], y=[index], mode="markers", name=escape(name), hovertemplate=text,
            marker={"size": 10, "line": {"width": 1.5, "color": "var(--card)"}, **colour},
        )  # fmt: skip
        _right_label(figure, index, text)
    figure.add_vline(x=0, line={"width": 1, "color": "var(--faint)"})
    ends = np.array([0.0, *(end for _, _, *bounds in rows for end in bounds)])
    figure.update_xaxes(range=_padded(ends, 0.06), nticks=6, fixedrange=True)
    _stage_rows(figure, [name for name, *_ in rows])
    return figure


def times(
    rows: Sequence[tuple[str, Sequence[float], str]], parts: Sequence[tuple[str, str, float]]
) -> go.Figure:
    """Draw a bar per row: (name, seconds of each part, label), the parts stacked. parts: (name, colour, opacity)."""
    figure = _figure(
        34 * len(rows) + 12, margin={"l": 74, "r": 66, "t": 4, "b": 4}, barmode="stack", bargap=0.45
    )
    for part, (name, colour, opacity) in enumerate(parts):
        figure.add_bar(
            x=[row[1][part] for row in rows], y=list(range(len(rows))), orientation="h", name=name,
            marker={"color": f"var(--{colour})", "opacity": opacity, "line": {"width": 0}}, hovertemplate="%{x:,.0f} s",
        )  # fmt: skip
    for index, (*_, label) in enumerate(rows):
        _right_label(figure, index, label)
    figure.update_xaxes(visible=False, fixedrange=True)
    _stage_rows(figure, [name for name, *_ in rows])
    return figure


def _figure(height: int, **layout: Any) -> go.Figure:
    axis = {
        "gridcolor": "var(--grid)",
        "zeroline": False,
        "tickfont": {"size": 11},
        "ticklabelstandoff": 4,
    }
    return go.Figure(
        layout=go.Layout(
            template=go.layout.Template(), height=height, showlegend=False, font={"family": "var(--font)", "size": 11, "color": "var(--soft)"},
            paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", xaxis=axis, yaxis=axis,
            uirevision="kept over a change of colours", hoverlabel={"bgcolor": "var(--card)", "bordercolor": "var(--rule)", "font": {"size": 12, "color": "var(--ink)"}},
            modebar={"bgcolor": "var(--card)", "color": "var(--faint)", "activecolor": "var(--ink)"}, **layout,
        )
    )  # fmt: skip


def _steps(x: np.ndarray) -> dict[str, Any]:
    """Return the x values of a trace; steps without a gap need only the first."""
    if np.array_equal(np.diff(x), np.ones(len(x) - 1)):
        return {"x0": x[0], "dx": 1}
    return {"x": x.astype(np.int64)}


def _padded(values: np.ndarray, share: float) -> list[float]:
    """Return the range of an axis. A constant lies in the middle, above 0."""
    low, high = float(values.min()), float(values.max())
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        return [low - abs(low), high + abs(high)] if high else [0.0, 1.0]
    return [low - share * (high - low), high + share * (high - low)]


def _tick_format(values: np.ndarray) -> str:
    """Return d3's format for the ticks: with an exponent if that is shorter, with k from 10,000."""
    largest = np.abs(values).max()
    if largest and not 1e-3 <= largest < 1e6:
        return "~e"
    return "~s" if largest >= 1e4 else "~g"


def _bar_between(figure: go.Figure, x: list, y: list, style: dict[str, str]) -> None:
    """Draw a pale bar between two points."""
    figure.add_scatter(x=x, y=y, mode="lines", opacity=0.3, line={"width": 7, **style}, hoverinfo="skip")  # fmt: skip


def _stage_rows(figure: go.Figure, names: Sequence[str]) -> None:
    """Give the y axis a row per name, the first on top, the names at the left edge of the chart."""
    figure.update_yaxes(range=[len(names) - 0.5, -0.5], visible=False, fixedrange=True)
    for index, name in enumerate(names):
        figure.add_annotation(
            x=0, xref="paper", xanchor="left", xshift=-_margin(figure, "l"), y=index, text=escape(name),
            showarrow=False, font={"size": 12.5, "color": "var(--ink)"},
        )  # fmt: skip


def _right_label(figure: go.Figure, y: int, text: str) -> None:
    figure.add_annotation(
        x=1, xref="paper", xanchor="right", xshift=_margin(figure, "r") - 2, y=y, text=escape(text),
        showarrow=False, font={"size": 12, "color": "var(--ink)"},
    )  # fmt: skip


def _margin(figure: go.Figure, side: str) -> int:
    layout: Any = figure.layout  # Plotly's own annotation is wrong
    return layout.margin[side]


def _interval(rung: Rung) -> str:
    return "" if rung.low is None or rung.high is None else f" [{rung.low:.1f}, {rung.high:.1f}]"


def _label_side(rung: Rung, others: Sequence[Rung]) -> str:
    """Return where a value stands: above its point, or below if another line's point is there and 0 is far."""
    taken = any(rung.value + 2 < other.value < rung.value + 14 for other in others)
    return "bottom center" if taken and rung.value > 12 else "top center"


def _spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Return heights near the `wanted` ones, at least `gap` apart: each, from the lowest, clears the one below."""
    placed = np.array(wanted, dtype=float)
    order = np.argsort(placed, kind="stable")
    for lower, upper in zip(order, order[1:], strict=False):
        placed[upper] = max(placed[upper], placed[lower] + gap)
    return placed.tolist()
