"""Charts as SVG and HTML; the page's style sheet gives the colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Bar", "Line", "bars", "dots", "lines"]

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 40


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        name: Text in the legend.
        points: Pairs of x and y.
        colour: Number of a colour of the style sheet, from 1.
        dashed: Whether the curve is dashed.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    dashed: bool = False


@dataclass(frozen=True)
class Bar:
    """A bar.

    Attributes:
        label: Text before the bar.
        value: Length of the bar.
        text: The value as text, behind the bar.
        margin: Half width of the value's interval; 0 draws none.
        colour: Number of a colour of the style sheet, from 1.
    """

    label: str
    value: float
    text: str
    margin: float = 0.0
    colour: int = 1


@dataclass(frozen=True)
class _Frame:
    """Maps data to SVG coordinates.

    Attributes:
        x: First and last x.
        y: First and last y.
    """

    x: tuple[float, float]
    y: tuple[float, float]

    def across(self, x: float) -> str:
        low, high = self.x
        return f"{LEFT + (WIDTH - LEFT - RIGHT) * (x - low) / ((high - low) or 1):.1f}"

    def down(self, y: float) -> str:
        """The distance from the top; values outside the frame are clipped."""
        low, high = self.y
        share = (min(max(y, low), high) - low) / ((high - low) or 1)
        return f"{TOP + (HEIGHT - TOP - BOTTOM) * (1 - share):.1f}"


def lines(
    curves: Sequence[Line],
    *,
    x: tuple[float, float],
    y: tuple[float, float],
    x_label: str,
    y_label: str,
    percent: bool = False,
    integers: bool = False,
) -> str:
    """Chart of curves.

    Args:
        curves: The curves.
        x: First and last x of the axis.
        y: First and last y of the axis.
        x_label: Label of the x axis.
        y_label: Title of the chart, also for screen readers.
        percent: Show y, from 0 to 1, as percentages.
        integers: Show only integers on the x axis.
    """
    frame = _Frame(x, y)
    y_texts = {tick: f"{tick:.0%}" if percent else f"{tick:g}" for tick in _ticks(*y)}
    x_ticks = [tick for tick in _ticks(*x) if not integers or tick == round(tick)]
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    parts = [
        *(_y_tick(frame.down(tick), text) for tick, text in y_texts.items()),
        *(_text(frame.across(tick), HEIGHT - BOTTOM + 16, f"{tick:g}") for tick in x_ticks),
        _text(middle, HEIGHT - 4, escape(x_label)),
        *(_curve(curve, frame) for curve in curves),
    ]
    legend = "".join(
        f'<span><i class="b{c.colour}{" dashed" if c.dashed else ""}"></i>{escape(c.name)}</span>'
        for c in curves
    )
    return (
        f'<figure class="chart"><figcaption>{escape(y_label)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)}">'
        f"{''.join(parts)}</svg><div class='legend'>{legend}</div></figure>"
    )


def bars(
    rows: Sequence[Bar], *, title: str, most: float | None = None, unit: str | None = None
) -> str:
    """Chart of horizontal bars that start at zero.

    Args:
        rows: The bars, from top to bottom.
        title: Title of the chart.
        most: Value of a full bar; None takes the largest value.
        unit: Text behind the numbers of an axis below the bars; None draws no axis.
    """
    full = max((row.value + row.margin for row in rows), default=1.0) if most is None else most
    full = full or 1.0
    ticks = [] if unit is None else _ticks(0, full)
    lines = _grid_lines(ticks, 0, full)
    parts = []
    for row in rows:
        length = _percent(row.value, 0, full)
        whisker = _whisker(row, 0, full) if row.margin else ""
        mark = f'<i class="b{row.colour}" style="width:{length:.1f}%"></i>'
        parts.append(_row(row, f'<span class="bar">{lines}{mark}{whisker}</span>'))
    axis = "" if unit is None else _axis(ticks, 0, full, unit)
    return _rows_figure("bars", title, rows, parts, axis)


def dots(rows: Sequence[Bar], *, title: str, x: tuple[float, float], unit: str = "") -> str:
    """Chart of dots with their intervals, on an axis that need not start at zero.

    A dot's place says its value, not a length, so a part of the axis may be left out. The chart
    says so, and draws the break.

    Args:
        rows: Values and intervals, from top to bottom.
        title: Title of the chart.
        x: First and last value of the axis.
        unit: Text behind the numbers of the axis.
    """
    low, high = x
    ticks = _ticks(low, high)
    lines = _grid_lines(ticks, low, high)
    parts = []
    for row in rows:
        whisker = _whisker(row, low, high) if row.margin else ""
        place = _percent(row.value, low, high)
        mark = f'<i class="dot b{row.colour}" style="left:{place:.1f}%"></i>'
        parts.append(_row(row, f'<span class="bar dots">{lines}{whisker}{mark}</span>'))
    note = ""
    if low != 0:
        start = f"{low:g}{escape(unit)}"
        note = (
            f'<p class="break"><b aria-hidden="true">//</b> The axis starts at {start}, not at 0: '
            "compare the places of the dots, not their distances from the left.</p>"
        )
    broken = " broken" if low != 0 else ""
    return _rows_figure(f"bars{broken}", title, rows, parts, _axis(ticks, low, high, unit), note)


def _rows_figure(
    kind: str, title: str, rows: Sequence[Bar], parts: Sequence[str], axis: str, note: str = ""
) -> str:
    """A figure of rows; to a screen reader it is one picture with its values."""
    spoken = escape("; ".join(f"{row.label}: {row.text}" for row in rows))
    return (
        f'<figure class="chart {kind}"><figcaption>{escape(title)}</figcaption>'
        f'<div role="img" aria-label="{escape(title)}. {spoken}">{"".join(parts)}{axis}</div>'
        f"{note}</figure>"
    )


def _row(row: Bar, plot: str) -> str:
    return (
        f'<div class="line"><span class="name">{escape(row.label)}</span>{plot}'
        f'<span class="value">{escape(row.text)}</span></div>'
    )


def _axis(ticks: Sequence[float], low: float, high: float, unit: str) -> str:
    """Numbers below the rows."""
    texts = "".join(
        f'<em style="left:{_percent(tick, low, high):.1f}%">{tick:g}{escape(unit)}</em>'
        for tick in ticks
    )
    return (
        f'<div class="line axis"><span class="name"></span><span class="bar">{texts}</span>'
        '<span class="value"></span></div>'
    )


def _grid_lines(ticks: Sequence[float], low: float, high: float) -> str:
    return "".join(f'<s style="left:{_percent(tick, low, high):.1f}%"></s>' for tick in ticks)


def _whisker(row: Bar, low: float, high: float) -> str:
    """The interval of a value, clipped to the axis."""
    first = _percent(row.value - row.margin, low, high)
    last = _percent(row.value + row.margin, low, high)
    return f'<u style="left:{first:.1f}%;width:{last - first:.1f}%"></u>'


def _percent(value: float, low: float, high: float) -> float:
    """Place of a value between two others in per cent, clipped."""
    return 100 * min(max((value - low) / ((high - low) or 1.0), 0.0), 1.0)


def _y_tick(y: str, text: str) -> str:
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
        f'<text x="{LEFT - 6}" y="{y}" class="y">{text}</text>'
    )


def _text(x: str | float, y: float, text: str) -> str:
    return f'<text x="{x}" y="{y}" class="x">{text}</text>'


def _curve(curve: Line, frame: _Frame) -> str:
    """A polyline; a single point also gets a dot, as its polyline is invisible."""
    points = [(frame.across(x), frame.down(y)) for x, y in curve.points]
    dash = ' stroke-dasharray="5 4"' if curve.dashed else ""
    path = " ".join(f"{x},{y}" for x, y in points)
    line = f'<polyline class="c{curve.colour}"{dash} points="{path}"/>'
    if len(points) == 1:
        x, y = points[0]
        line += f'<circle class="d{curve.colour}" cx="{x}" cy="{y}" r="3"/>'
    return line


def _ticks(low: float, high: float) -> list[float]:
    """At most seven round numbers, equally spaced, from one end to the other."""
    span = high - low
    if span <= 0:
        return [low]
    for power in range(-9, 10):
        for factor in (1, 2, 2.5, 5):
            step = factor * 10.0**power
            if span / step <= 6:
                first = -(-low // step)
                count = int((high - first * step) / step + 1e-9) + 1
                return [round((first + i) * step, 10) for i in range(count)]
    return [low, high]
