"""Charts as SVG and HTML that take their colours from the page, light or dark."""

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
        name: In the legend.
        points: Pairs of x and y.
        colour: Number of a colour of the page, from 1.
        dashed: Drawn with gaps.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    dashed: bool = False


@dataclass(frozen=True)
class Bar:
    """A labelled value.

    Attributes:
        label: What.
        value: How much.
        text: The value in words.
        half: Half of its interval.
        colour: Number of a colour of the page, from 1.
    """

    label: str
    value: float
    text: str
    half: float = 0.0
    colour: int = 1


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
    """Curves over a common x.

    Args:
        curves: What to draw.
        x: Ends of the x axis.
        y: Ends of the y axis.
        x_label: Below it.
        y_label: Above the y axis, and the picture's name for screen readers.
        percent: Write y, 0 to 1, as percentages.
        integers: Write x as whole numbers only.
    """
    (x0, x1), (y0, y1) = x, y
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(point: tuple[float, float]) -> str:
        across = LEFT + wide * (point[0] - x0) / ((x1 - x0) or 1)
        up = TOP + high * (1 - (min(max(point[1], y0), y1) - y0) / ((y1 - y0) or 1))
        return f"{across:.1f},{up:.1f}"

    parts = []
    for tick in _ticks(y0, y1):
        at = place((x0, tick)).split(",")[1]
        label = f"{tick:.0%}" if percent else f"{tick:g}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at}" class="y">{label}</text>')
    for tick in _ticks(x0, x1):
        if integers and tick != round(tick):
            continue
        at = place((tick, y0)).split(",")[0]
        parts.append(f'<text x="{at}" y="{HEIGHT - BOTTOM + 16}" class="x">{tick:g}</text>')
    middle = LEFT + wide / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" class="x">{escape(x_label)}</text>')
    for curve in curves:
        points = " ".join(map(place, curve.points))
        dash = ' stroke-dasharray="5 4"' if curve.dashed else ""
        parts.append(f'<polyline class="c{curve.colour}"{dash} points="{points}"/>')
        if len(curve.points) == 1:
            cx, cy = place(curve.points[0]).split(",")
            parts.append(f'<circle class="d{curve.colour}" cx="{cx}" cy="{cy}" r="3"/>')
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
    """Horizontal bars, one row each.

    Args:
        rows: What to draw.
        title: Above.
        least: Value of an empty bar.
        most: Value of a full bar; None takes the largest.
    """
    full = max((row.value + row.half for row in rows), default=1.0) if most is None else most
    span = (full - least) or 1.0
    parts = []
    for row in rows:
        share = 100 * min(max((row.value - least) / span, 0), 1)
        whisker = ""
        if row.half:
            low = 100 * max((row.value - row.half - least) / span, 0)
            high = 100 * min((row.value + row.half - least) / span, 1)
            whisker = f'<u style="left:{low:.1f}%;width:{high - low:.1f}%"></u>'
        parts.append(
            f'<div class="line"><span class="name" title="{escape(row.label)}">{escape(row.label)}'
            f'</span><span class="bar"><i class="b{row.colour}" style="width:{share:.1f}%"></i>'
            f'{whisker}</span><span class="value">{escape(row.text)}</span></div>'
        )
    return (
        f'<figure class="chart bars"><figcaption>{escape(title)}</figcaption>'
        f"{''.join(parts)}</figure>"
    )


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers from one end to the other."""
    span = high - low
    if span <= 0:
        return [low]
    step = 1e-9
    for power in range(-9, 10):
        for factor in (1, 2, 2.5, 5):
            step = factor * 10.0**power
            if span / step <= 6:
                first = -(-low // step)
                count = int((high - first * step) / step + 1e-9) + 1
                return [round((first + i) * step, 10) for i in range(count)]
    return [low, high]
