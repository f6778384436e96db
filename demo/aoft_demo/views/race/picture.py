"""The result of a race as a picture to share: SVG of 1200 × 630, in the page's light colours."""

from __future__ import annotations

from datetime import date
from html import escape
from importlib.metadata import version

from aoft_demo.actions.race_stages import Lane, Standing
from aoft_demo.views.race.texts import headline, lane_name, lap_time, times
from aoft_demo.views.units import size

__all__ = ["HEIGHT", "WIDTH", "race_picture"]

WIDTH, HEIGHT = 1200, 630

LEFT, BAR, LENGTH = 72, 330, 560
"""Left margin, left end of the bars, and the longest bar, in pixels."""

INK, SOFT, ACCENT, GREY, TRACK = "#0f172a", "#526070", "#0f766e", "#94a3b8", "#e8edf1"

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def race_picture(standing: Standing, day: date) -> str:
    """Draw a finished race.

    Args:
        standing: The race at its end.
        day: The day to write on it.
    """
    lanes = [lane for lane in standing.lanes if not lane.absent]
    title = headline(standing)
    big = min(50, int((WIDTH - 2 * LEFT) / (0.62 * len(title))))  # wide fonts take 0.62 em
    skills, threads = len(standing.skills), standing.threads
    subtitle = (
        f"{standing.pictures} picture{'s' * (standing.pictures != 1)} for "
        f"{skills} skill{'s' * (skills != 1)}, measured live"
    )
    machine = standing.processor if len(standing.processor) <= 36 else standing.processor[:35] + "…"
    foot = f"{machine} · {threads} thread{'s' * (threads != 1)} each · {day:%d %B %Y}"
    parts = [
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<rect width="{WIDTH}" height="12" fill="{ACCENT}"/>',
        _text(LEFT, 96, title, big, INK, "700"),
        _text(LEFT, 140, subtitle, 26, SOFT),
        *_bars(200, "Time", [(x, x.laps.median, lap_time(x.laps.median)) for x in lanes], standing),
        *_bars(392, "Memory", [(x, float(x.weights), size(x.weights)) for x in lanes], standing),
        f'<rect x="{LEFT}" y="562" width="{WIDTH - 2 * LEFT}" height="1" fill="{TRACK}"/>',
        _text(LEFT, 598, foot, 20, SOFT),
        _text(WIDTH - LEFT, 598, f"aoft-deploy {version('aoft-deploy')}", 20, SOFT, end=True),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="{escape(FONT)}">{"".join(parts)}</svg>'
    )


def _bars(
    top: int, name: str, rows: list[tuple[Lane, float, str]], standing: Standing
) -> list[str]:
    """A group of bars with a common scale from 0."""
    longest, one = max(value for _, value, _ in rows), rows[0][1]
    parts = [_text(LEFT, top, name.upper(), 18, SOFT, "600")]
    for i, (lane, value, shown) in enumerate(rows):
        y, colour = top + 22 + 46 * i, ACCENT if lane.key == "mixed" else GREY
        length = max(4.0, LENGTH * value / longest)
        label = lane_name(lane, standing)
        ratio = "" if lane.key == "mixed" else f"  {times(value / one)}"
        parts += [
            _text(LEFT, y + 24, label[0].upper() + label[1:], 24, INK),
            f'<rect x="{BAR}" y="{y}" width="{length:.1f}" height="32" rx="6" fill="{colour}"/>',
            _text(BAR + length + 14, y + 24, shown + ratio, 24, INK, "600"),
        ]
    return parts


def _text(
    x: float,
    y: float,
    text: str,
    pixels: int,
    colour: str,
    weight: str = "400",
    *,
    end: bool = False,
) -> str:
    anchor = ' text-anchor="end"' if end else ""
    return (
        f'<text x="{x:.1f}" y="{y}" font-size="{pixels}" font-weight="{weight}" '
        f'fill="{colour}"{anchor} xml:space="preserve">{escape(text)}</text>'
    )
