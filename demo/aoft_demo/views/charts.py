"""Charts as SVG and HTML; the page's style sheet gives the colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Bar", "Line", "bars", "lines"]

WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 38


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


def bars(rows: Sequence[Bar], *, title: str, least: float = 0.0, most: float | None = None) -> str:
    """Chart of horizontal bars.

    Args:
        rows: The bars, from top to bottom.
        title: Title of the chart.
        least: Value of an empty bar.
        most: Value of a full bar; None takes the largest value.
    """
    full = max((row.value + row.margin for row in rows), default=1.0) if most is None else most
    span = (full - least) or 1.0
    parts = []
    for row in rows:
        length = 100 * min(max((row.value - least) / span, 0), 1)
        whisker = ""
        if row.margin:
            low = 100 * max((row.value - row.margin - least) / span, 0)
            high = 100 * min((row.value + row.margin - least) / span, 1)
            whisker = f'<u style="left:{low:.1f}%;width:{high - low:.1f}%"></u>'
        parts.append(
            f'<div class="line"><span class="name" title="{escape(row.label)}">{escape(row.label)}'
            f'</span><span class="bar"><i class="b{row.colour}" style="width:{length:.1f}%"></i>'
            f'{whisker}</span><span class="value">{escape(row.text)}</span></div>'
        )
    return (
        f'<figure class="chart bars"><figcaption>{escape(title)}</figcaption>'
        f"{''.join(parts)}</figure>"
    )


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
