"""Charts of the report as inline SVG: no script, no fonts, no network; colours come from the page's CSS."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

_MAX_POINTS = 240
_SMOOTH_FROM = 60  # a curve of fewer points is drawn as it is


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart; `colour` is a class of the style sheet, c1 to c4."""

    name: str
    points: Sequence[Point]
    colour: str = "c1"


@dataclass(frozen=True, slots=True)
class Frame:
    """Maps data to the pixels of a `width` x `height` drawing with the given margins."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x_range: Point
    y_range: Point

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        low, high = self.y_range
        span = self.height - self.top - self.bottom
        return self.height - self.bottom - (value - low) / (high - low) * span


def line_chart(
    series: Sequence[Series],
    x_label: str = "step",
    *,
    x_ticks: Sequence[tuple[float, str]] | None = None,
    from_zero: bool = False,
) -> str:
    """Lines over a common x axis; a long noisy one is drawn pale, its running mean over it.

    x_ticks: (x, label) of the marks below, for an axis that is not linear; none: round numbers.
    """
    every = [point for one in series for point in one.points]
    x_low, x_high = _padded([x for x, _ in every], 0.0)
    y_low, y_high = _padded([y for _, y in every] + [0.0] * from_zero, 0.06)
    ticks = _ticks(0.0 if from_zero else y_low, y_high, 4)
    label = tick_labels(ticks)
    left = 12 + 6.4 * max(len(text) for text in [*label, x_label])
    frame = Frame(340, 190, left, 12, 8, 26, (x_low, x_high), (y_low, y_high))
    parts = [_grid(frame, ticks, label)]
    if x_ticks is None:
        values = _ticks(x_low, x_high, 4)
        x_ticks = list(zip(values, tick_labels(values), strict=True))
    for value, text in x_ticks:
        parts.append(_text(frame.x(value), frame.height - 8, text, "tick mid"))
    parts.append(_text(frame.left - 6, frame.height - 8, x_label, "tick end"))
    for one in series:
        points = _thinned(one.points)
        if len(one.points) >= _SMOOTH_FROM:
            parts.append(_path(frame, points, f"line raw {one.colour}"))
            points = _thinned(_smoothed(one.points))
        parts.append(_path(frame, points, f"line {one.colour}"))
        if len(points) <= 12:
            parts += [_dot(frame, x, y, 2.4, one.colour) for x, y in points]
    name = ", ".join(one.name for one in series)
    return _svg(frame.width, frame.height, f"{name} over {x_label}", parts)


@dataclass(frozen=True, slots=True)
class Rung:
    """One stage of a ladder: its value in percent and, where known, its 95 % interval."""

    value: float
    low: float | None = None
    high: float | None = None


def ladder_chart(stages: Sequence[str], lines: Sequence[tuple[str, str, Sequence[Rung]]]) -> str:
    """Accuracy (0 to 100 %) over the stages; `lines` are (name, colour class, a rung per stage).

    The first line carries its values and whiskers for its intervals; the others stand behind it.
    """
    frame = Frame(420, 262, 40, 80, 16, 28, (-0.25, len(stages) - 0.75), (0, 100))
    ticks = [0, 25, 50, 75, 100]
    parts = [_grid(frame, ticks, [f"{tick} %" for tick in ticks])]
    for index, stage in enumerate(stages):
        parts.append(_text(frame.x(index), frame.height - 8, stage, "tick mid strong"))
    for order, (_, colour, rungs) in reversed(list(enumerate(lines))):
        points = [(float(i), rung.value) for i, rung in enumerate(rungs)]
        parts.append(_path(frame, points, f"line {colour} {'bold' if order == 0 else 'thin'}"))
        for index, rung in enumerate(rungs):
            if rung.low is not None and rung.high is not None:
                x = frame.x(index)
                ends = f"M{x:.1f} {frame.y(rung.low):.1f}V{frame.y(rung.high):.1f}"
                parts.append(f'<path class="whisker tall {colour}" d="{ends}"/>')
            parts.append(_dot(frame, index, rung.value, 4.5 if order == 0 else 2.6, colour))
            if order == 0:
                y = _label_height(frame, rung, [other[index] for _, _, other in lines[1:]])
                parts.append(_text(frame.x(index), y, f"{rung.value:.1f}", "value mid"))
    ends = [frame.y(rungs[-1].value) for _, _, rungs in lines]
    for (name, colour, _), y in zip(lines, _spread(ends, 15, frame.top + 4), strict=True):
        parts.append(_text(frame.x(len(stages) - 1) + 17, y + 4, name, f"name {colour}"))
    return _svg(frame.width, frame.height, "accuracy after each stage", parts)


def gain_chart(gains: Sequence[tuple[str, float, float, float]]) -> str:
    """A row per stage: (name, gain, low, high) in percentage points, with the line of no gain."""
    low = min(0.0, *(row[2] for row in gains))
    high = max(0.0, *(row[3] for row in gains))
    pad = 0.06 * (high - low or 1.0)
    height = 34 * len(gains) + 40
    frame = Frame(420, height, 78, 134, 8, 30, (low - pad, high + pad), (0, 1))
    ticks = _ticks(low, high, 5)
    parts = []
    for value, text in zip(ticks, tick_labels(ticks), strict=True):
        x = frame.x(value)
        parts.append(f'<path class="grid" d="M{x:.1f} {frame.top}V{height - frame.bottom}"/>')
        parts.append(_text(x, height - 14, text if value <= 0 else f"+{text}", "tick mid"))
    x = frame.x(0)
    parts.append(f'<path class="zero" d="M{x:.1f} {frame.top}V{height - frame.bottom}"/>')
    for index, (name, gain, from_, to) in enumerate(gains):
        y = frame.top + 34 * index + 18
        sure = "c1" if from_ > 0 else ("c2" if to < 0 else "c0")
        ends = f"M{frame.x(from_):.1f} {y}H{frame.x(to):.1f}"
        parts.append(f'<path class="whisker wide {sure}" d="{ends}"/>')
        parts.append(f'<circle class="dot {sure}" cx="{frame.x(gain):.1f}" cy="{y}" r="5"/>')
        parts.append(_text(0, y + 4, name, "row"))
        text = f"{gain:+.1f} [{from_:+.1f}, {to:+.1f}]".replace("-", "−")
        parts.append(_text(frame.width, y + 4, text, "interval end"))
    return _svg(frame.width, height, "gain of each stage with its 95 % interval", parts)


def time_chart(rows: Sequence[tuple[str, float, float, str]]) -> str:
    """A bar per row: (name, seconds of training, of evaluation, label), the two stacked."""
    height = 34 * len(rows) + 12
    most = max(training + evaluation for _, training, evaluation, _ in rows) or 1.0
    frame = Frame(420, height, 78, 70, 8, 4, (0, most), (0, 1))
    parts = []
    for index, (name, training, evaluation, label) in enumerate(rows):
        y = frame.top + 34 * index + 9
        split, end = frame.x(training), frame.x(training + evaluation)
        parts.append(_bar(frame.left, split, y, "c1"))
        parts.append(_bar(split, end, y, "c0"))
        parts.append(_text(0, y + 13, name, "row"))
        parts.append(_text(frame.width, y + 13, label, "interval end"))
    return _svg(frame.width, height, "time of training and evaluation of each stage", parts)


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Labels of evenly spaced ticks, all with the digits that tell neighbours apart."""
    largest = max(abs(tick) for tick in ticks)
    if largest and (largest < 1e-3 or largest >= 1e6):
        digits = 1
        while digits < 9 and any(abs(float(f"{t:.{digits}e}") - t) > 1e-6 * largest for t in ticks):
            digits += 1
        return [
            re.sub(r"e\+?(-?)0*(\d)", r"e\1\2", f"{tick:.{digits}e}") if tick else "0"
            for tick in ticks
        ]
    if largest >= 1e4:
        return [f"{tick / 1000:g}k" for tick in ticks]
    decimals = 0
    while decimals < 7 and any(abs(round(t, decimals) - t) > 1e-6 * largest for t in ticks):
        decimals += 1
    return [f"{tick:.{decimals}f}".replace("-", "−") for tick in ticks]


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers inside [low, high], roughly `about` of them, at least one."""
    if high <= low:  # a single point
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    ticks = [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]
    return ticks or [(low + high) / 2]


def _padded(values: Sequence[float], share: float) -> Point:
    low, high = min(values), max(values)
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        # A flat curve stands in the middle, over zero.
        return (low - abs(low), high + abs(high)) if high else (0.0, 1.0)
    return low - share * (high - low), high + share * (high - low)


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    """At most `_MAX_POINTS` points, each the mean of its neighbours."""
    if len(points) <= _MAX_POINTS:
        return points
    cuts = [round(i * len(points) / _MAX_POINTS) for i in range(_MAX_POINTS + 1)]
    return [_mean(points[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]


def _smoothed(points: Sequence[Point]) -> list[Point]:
    """A straight line fitted to a twentieth of the curve around each point: no lag, no hook at the ends."""
    reach = max(2, len(points) // 40)
    result = []
    for i, (x, _) in enumerate(points):
        near = points[max(0, i - reach) : i + reach + 1]
        mean_x, mean_y = _mean(near)
        spread = sum((a - mean_x) ** 2 for a, _ in near)
        slope = sum((a - mean_x) * (b - mean_y) for a, b in near) / spread
        result.append((x, mean_y + slope * (x - mean_x)))
    return result


def _mean(points: Sequence[Point]) -> Point:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def _spread(wanted: Sequence[float], gap: float, top: float) -> list[float]:
    """Heights as near to `wanted` as keeps every two at least `gap` apart, none above `top`."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [max(wanted[i], top) for i in order]
    for _ in range(50):
        for i in range(1, len(placed)):
            if (missing := gap - (placed[i] - placed[i - 1])) > 0:
                placed[i - 1] = max(top, placed[i - 1] - missing / 2)
                placed[i] = placed[i] + missing / 2
    result = [0.0] * len(wanted)
    for i, y in zip(order, placed, strict=True):
        result[i] = y
    return result


def _label_height(frame: Frame, rung: Rung, others: Sequence[Rung]) -> float:
    """Above the rung, or below where another line's point is in the way and there is room."""
    above = frame.y(rung.value if rung.high is None else rung.high) - 8
    below = frame.y(rung.value if rung.low is None else rung.low) + 18
    taken = any(above - 14 < frame.y(other.value) < frame.y(rung.value) - 3 for other in others)
    return below if taken and below < frame.y(0) else above


def _grid(frame: Frame, ticks: Sequence[float], labels: Sequence[str]) -> str:
    parts = []
    for value, text in zip(ticks, labels, strict=True):
        y = frame.y(value)
        parts.append(f'<path class="grid" d="M{frame.left} {y:.1f}H{frame.width - frame.right}"/>')
        parts.append(_text(frame.left - 6, y + 4, text, "tick end"))
    return "".join(parts)


def _path(frame: Frame, points: Sequence[Point], css: str) -> str:
    if len(points) < 2:
        return ""
    d = "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in points)
    return f'<path class="{css}" d="M{d}"/>'


def _dot(frame: Frame, x: float, y: float, radius: float, colour: str) -> str:
    return (
        f'<circle class="dot {colour}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="{radius}"/>'
    )


def _bar(start: float, end: float, y: float, colour: str) -> str:
    return f'<rect class="bar {colour}" x="{start:.1f}" y="{y}" width="{end - start:.1f}" height="18"/>'


def _text(x: float, y: float, text: str, css: str) -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )
