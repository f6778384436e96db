"""What training changed, and measured results, as HTML; all texts are escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aoft_demo.actions.analysis import Family, TaskAnalysis
from aoft_demo.actions.evidence import Accuracy, Speed
from aoft_demo.views.charts import Bar, Line, bars, lines
from aoft_demo.views.notices import empty
from aoft_demo.views.parts import facts, table

__all__ = ["analysis_cards", "attention_card", "evidence_cards"]


def analysis_cards(name: str, analysis: TaskAnalysis) -> str:
    """Angles of a task as curves and as a table, and the size of each layer's update."""
    low, high, bins = 60.0, 120.0, 120
    curves = []
    for number, family in enumerate(analysis.families):
        colour = (2, 1, 3)[min(number // 2, 2)]
        points = [(x, y) for x, y in _rebinned(family, bins) if low <= x <= high]
        curves.append(Line(family.name, points, colour, dashed=number % 2 == 1))
    most = max((y for curve in curves for _, y in curve.points), default=1.0)
    chart = lines(
        curves,
        x=(low, high),
        y=(0, most),
        x_label="angle between two vectors in degrees",
        y_label="Share of pairs of vectors per 1.5 degrees",
        percent=True,
    )
    rows = "".join(
        f'<tr data-family="{escape(f.name)}"><td>{escape(f.name)}</td><td>{f.mean:.1f}°</td>'
        f"<td>{f.sd:.2f}°</td><td>{f.farthest:.1f}°</td></tr>"
        for f in analysis.families
    )
    columns = ("vectors", "mean", "std. deviation", "farthest from 90°")
    sizes = bars(
        [Bar(layer, ratio, f"{ratio:.3f}") for layer, ratio in analysis.layers],
        title="Size of each layer's update, ‖ΔW‖₂ / ‖W‖₂",
    )
    notes = "".join(f"<p class='note'>{escape(note)}</p>" for note in analysis.notes)
    return (
        f"{facts(f'Inside <b>{escape(name)}</b>')}"
        f'<div class="two"><div>{chart}{table("Angles", columns, rows)}</div>'
        f"<div>{sizes if analysis.layers else ''}{notes}</div></div>"
    )


def _rebinned(family: Family, bins: int) -> list[tuple[float, float]]:
    """Centre of each of fewer, equal bins from 0 to 180 degrees, with its share of the pairs."""
    total = sum(family.counts) or 1
    width = 180 / len(family.counts)
    shares = [0.0] * bins
    for i, count in enumerate(family.counts):
        shares[min(int((i + 0.5) * width / 180 * bins), bins - 1)] += count / total
    return [((i + 0.5) * 180 / bins, share) for i, share in enumerate(shares)]


def attention_card(name: str, picture: Image.Image, grid: NDArray[np.float32]) -> str:
    """The overlay of a task's attention, with the patch of the highest attention in words."""
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=88)
    data = base64.b64encode(content.getvalue()).decode()
    row, column = np.unravel_index(int(grid.argmax()), grid.shape)
    text = escape(
        f"Attention of the class token in the last block of {name}: highest at row {row + 1}, "
        f"column {column + 1} of {grid.shape[0]} × {grid.shape[1]} patches."
    )
    return (
        f'<figure class="look"><img src="data:image/jpeg;base64,{data}" alt="{text}"/>'
        f'<figcaption data-patch="{row},{column}">{text}</figcaption></figure>'
    )


def evidence_cards(accuracy: Sequence[Accuracy], speed: Sequence[Speed]) -> str:
    """The project's own measurements."""
    if not accuracy:
        return empty("No measurements found", "They are part of the project's wheel.")
    left = bars(
        [
            Bar(
                f"{a.method} · {a.parameters:,}",
                100 * a.mean,
                f"{100 * a.mean:.1f} ± {100 * a.margin:.1f}",
                100 * a.margin,
                1 if "AOFT" in a.method or "RLRR" in a.method else 2,
            )
            for a in sorted(accuracy, key=lambda a: -a.mean)
        ],
        title="Test accuracy on digits at 32 pixels in %, and number of trained parameters",
        least=90,
    )
    ratios = [Bar(s.name, s.ratio, f"{s.ratio:.2f} ×") for s in speed]
    right = bars(ratios, title="Throughput of ViT-B/16 on two CPU cores", most=3)
    baseline, batch = (speed[0].baseline, speed[0].batch) if speed else ("nothing", 0)
    note = (
        f'<p class="note">Merged models in batches of {batch}: relative to {escape(baseline)}. '
        "Fleets with 16 tasks in a batch: relative to one task's merged model of the same "
        "precision. Scripts: benchmarks/export/engines.py, benchmarks/fleet/fleet.py and "
        "benchmarks/accuracy/methods.py.</p>"
    )
    return f'<div class="two"><div>{left}</div><div>{right}{note}</div></div>'
