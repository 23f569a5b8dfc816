"""Charts as inline SVG text: axes, ticks, bands, lines, points and a legend. No dependency, no script.

Colours are CSS classes (`s1` .. `s6`), so that the page decides how they look on a light and on a dark background.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from html import escape
from typing import Literal

MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 68, 16, 14, 46
_LEGEND_ROW = 20
_CHARACTER_WIDTH = 6.6  # of the legend's 12 px font, on average


@dataclass(frozen=True)
class Series:
    """One line, set of points, or both.

    Attributes:
        name: legend entry; empty for none.
        points: (x, y) in data units, in the order they are joined.
        color: number of the CSS class, from 1.
        style: line with or without markers, a faint line for raw values, dashes, or markers alone.
        band: (x, low, high) drawn behind as an area.
    """

    name: str
    points: list[tuple[float, float]]
    color: int = 1
    style: Literal["line", "marked", "faint", "dashed", "points"] = "line"
    band: list[tuple[float, float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Marker:
    """A vertical or horizontal line with a label, for example the training length."""

    axis: Literal["x", "y"]
    value: float
    label: str


@dataclass(frozen=True)
class Chart:
    """What to draw; `svg` turns it into text. Points above `y_top` are left out."""

    title: str
    x_label: str
    y_label: str
    series: list[Series]
    markers: list[Marker] = field(default_factory=list)
    x_log2: bool = False
    y_from_zero: bool = False
    y_top: float = math.inf
    width: int = 760
    height: int = 320


@dataclass(frozen=True)
class _Frame:
    """Data range and the place of the plot area in the picture."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    left: float
    right: float
    top: float
    bottom: float
    x_log2: bool

    def x(self, value: float) -> float:
        value = math.log2(value) if self.x_log2 else value
        return self.left + (value - self.x_low) / (self.x_high - self.x_low) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - (value - self.y_low) / (self.y_high - self.y_low) * (self.bottom - self.top)


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten) from `low` to `high`, both inside."""
    if not high > low:
        return [low]
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def format_tick(value: float) -> str:
    """Short text of a tick: 0.05, 2.6, 500, 20k, 1.5M."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if suffix == 'k' else limit):.4g}{suffix}"
    return f"{value:.4g}"


def format_length(tokens: float) -> str:
    """A context length as people write it: 512, 4k (= 4096), 1M (= 2^20)."""
    whole = round(tokens)
    for unit, suffix in ((2**20, "M"), (2**10, "k")):
        if whole >= unit and whole % unit == 0:
            return f"{whole // unit}{suffix}"
    return str(whole)


def svg(chart: Chart) -> str:
    """The chart as one `<svg>` element; without finite points, a frame that says that there is no data yet."""
    series = [_drawable(entry, chart) for entry in chart.series]
    series = [entry for entry in series if entry.points]
    legend_lines = _legend_rows([entry for entry in series if entry.name], chart.width)
    frame = _frame(chart, series, MARGIN_TOP + _LEGEND_ROW * len(legend_lines) + (6 if legend_lines else 0))
    parts = [
        f'<svg class="chart" viewBox="0 0 {chart.width} {chart.height}" role="img" '
        f'aria-label="{escape(chart.title, quote=True)}">'
    ]
    if not series:
        parts.append(f'<text class="nodata" x="{chart.width / 2}" y="{chart.height / 2}">no data yet</text></svg>')
        return "".join(parts)
    parts += [_axes(chart, frame), _marker_lines(chart, frame)]
    parts += [_band(entry, frame) for entry in series if entry.band]
    parts += [_line(entry, frame) for entry in series]
    parts += [_dots(entry, frame, chart) for entry in series if entry.style in ("marked", "points")]
    parts.append(_legend(legend_lines))
    parts.append("</svg>")
    return "".join(parts)


def _drawable(series: Series, chart: Chart) -> Series:
    """The series without what is not finite, has no logarithm, or lies above the top."""

    def good(*values: float) -> bool:
        return all(math.isfinite(value) for value in values) and not (chart.x_log2 and values[0] <= 0)

    return replace(
        series,
        points=[(x, y) for x, y in series.points if good(x, y) and y <= chart.y_top],
        band=[(x, low, min(high, chart.y_top)) for x, low, high in series.band if good(x, low) and low <= chart.y_top],
    )


def _frame(chart: Chart, series: list[Series], top: float) -> _Frame:
    xs = [x for entry in series for x, _ in entry.points] or [0.0, 1.0]
    ys = [y for entry in series for _, y in entry.points]
    ys += [y for entry in series for _, low, high in entry.band for y in (low, high)]
    ys = ys or [0.0, 1.0]
    xs += [marker.value for marker in chart.markers if marker.axis == "x"]
    ys += [marker.value for marker in chart.markers if marker.axis == "y"]
    if chart.x_log2:
        xs = [math.log2(x) for x in xs]
    x_low, x_high = _spread(min(xs), max(xs), 0.03 if chart.x_log2 else 0.0)
    y_low, y_high = _spread(min(ys), max(ys), 0.07)
    if chart.y_from_zero:
        y_low = min(0.0, min(ys))
    right, bottom = chart.width - MARGIN_RIGHT, chart.height - MARGIN_BOTTOM
    return _Frame(x_low, x_high, y_low, y_high, MARGIN_LEFT, right, top, bottom, chart.x_log2)


def _spread(low: float, high: float, share: float) -> tuple[float, float]:
    """The range widened on both sides, never empty."""
    if high == low:
        half = abs(low) * 0.05 or 0.5
        return low - half, high + half
    return low - (high - low) * share, high + (high - low) * share


def _axes(chart: Chart, frame: _Frame) -> str:
    parts = []
    for value in nice_ticks(frame.y_low, frame.y_high, max(3, round((frame.bottom - frame.top) / 48))):
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{frame.left:.1f}" x2="{frame.right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick y" x="{frame.left - 8:.1f}" y="{y + 4:.1f}">{format_tick(value)}</text>')
    for value, label in _x_ticks(chart, frame):
        x = frame.x(value)
        parts.append(
            f'<line class="stub" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.bottom:.1f}" y2="{frame.bottom + 5:.1f}"/>'
        )
        parts.append(f'<text class="tick x" x="{x:.1f}" y="{frame.bottom + 19:.1f}">{label}</text>')
    middle_x, middle_y = (frame.left + frame.right) / 2, (frame.top + frame.bottom) / 2
    parts.append(
        f'<line class="axis" x1="{frame.left:.1f}" x2="{frame.right:.1f}" '
        f'y1="{frame.bottom:.1f}" y2="{frame.bottom:.1f}"/>'
    )
    parts.append(f'<text class="label" x="{middle_x:.1f}" y="{frame.bottom + 39:.1f}">{escape(chart.x_label)}</text>')
    parts.append(
        f'<text class="label" transform="translate(14 {middle_y:.1f}) rotate(-90)">{escape(chart.y_label)}</text>'
    )
    return "".join(parts)


def _x_ticks(chart: Chart, frame: _Frame) -> list[tuple[float, str]]:
    if not chart.x_log2:
        count = max(3, round((frame.right - frame.left) / 90))
        return [(value, format_tick(value)) for value in nice_ticks(frame.x_low, frame.x_high, count)]
    powers = range(math.ceil(frame.x_low), math.floor(frame.x_high) + 1)
    every = max(1, math.ceil(len(powers) * 46 / (frame.right - frame.left)))
    return [(2.0**power, format_length(2**power)) for power in powers if power % every == 0]


def _marker_lines(chart: Chart, frame: _Frame) -> str:
    parts = []
    for marker in chart.markers:
        label = escape(marker.label)
        if marker.axis == "x":
            x = frame.x(marker.value)
            late = x > frame.left + 0.75 * (frame.right - frame.left)
            parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.top:.1f}" y2="{frame.bottom:.1f}"/>')
            parts.append(
                f'<text class="note{" end" if late else ""}" x="{x + (-6 if late else 6):.1f}" '
                f'y="{frame.top + 11:.1f}">{label}</text>'
            )
        else:
            y = frame.y(marker.value)
            parts.append(f'<line class="mark" x1="{frame.left:.1f}" x2="{frame.right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="note end" x="{frame.right - 4:.1f}" y="{y - 6:.1f}">{label}</text>')
    return "".join(parts)


def _band(series: Series, frame: _Frame) -> str:
    if len(series.band) == 1:
        ((x, low, high),) = series.band
        place = f'x1="{frame.x(x):.1f}" x2="{frame.x(x):.1f}" y1="{frame.y(low):.1f}" y2="{frame.y(high):.1f}"'
        return f'<line class="whisker s{series.color}" {place}/>'
    upper = [f"{frame.x(x):.1f},{frame.y(high):.1f}" for x, _, high in series.band]
    lower = [f"{frame.x(x):.1f},{frame.y(low):.1f}" for x, low, _ in reversed(series.band)]
    return f'<polygon class="band s{series.color}" points="{" ".join(upper + lower)}"/>'


def _line(series: Series, frame: _Frame) -> str:
    if series.style == "points" or len(series.points) < 2:
        return ""
    points = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in series.points)
    return f'<polyline class="line {series.style} s{series.color}" points="{points}"/>'


def _dots(series: Series, frame: _Frame, chart: Chart) -> str:
    parts = []
    for x, y in series.points:
        shown = format_length(x) if chart.x_log2 else format_tick(x)
        hint = escape(f"{series.name}: {y:.4f} at {chart.x_label} {shown}")
        parts.append(
            f'<circle class="dot s{series.color}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3.6">'
            f"<title>{hint}</title></circle>"
        )
    return "".join(parts)


def _legend_rows(series: list[Series], width: int) -> list[list[tuple[float, Series]]]:
    rows: list[list[tuple[float, Series]]] = []
    x = float(MARGIN_LEFT)
    for entry in series:
        needed = 28 + len(entry.name) * _CHARACTER_WIDTH + 16
        if not rows or x + needed > width:
            rows.append([])
            x = float(MARGIN_LEFT)
        rows[-1].append((x, entry))
        x += needed
    return rows


def _legend(rows: list[list[tuple[float, Series]]]) -> str:
    parts = []
    for number, row in enumerate(rows):
        y = 14 + number * _LEGEND_ROW
        for x, entry in row:
            if entry.style == "points":
                parts.append(f'<circle class="dot s{entry.color}" cx="{x + 10:.1f}" cy="{y - 4}" r="3.6"/>')
            else:
                style = "dashed" if entry.style == "dashed" else "line"
                parts.append(
                    f'<line class="line {style} s{entry.color}" x1="{x:.1f}" x2="{x + 20:.1f}" '
                    f'y1="{y - 4}" y2="{y - 4}"/>'
                )
            parts.append(f'<text class="key" x="{x + 27:.1f}" y="{y}">{escape(entry.name)}</text>')
    return "".join(parts)
