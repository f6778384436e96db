"""The picture of a measurement: images a second of each artefact, by batch size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from aoft_deploy.artefacts.timing import Timing
from aoft_deploy.drawing import DPI
from aoft_deploy.files import settle, writable_folder

__all__ = ["draw_throughput"]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d")
"""The palette of Okabe and Ito for colour-blind readers."""


def draw_throughput(timings: Sequence[Timing], path: Path) -> None:
    """Write horizontal bars, one group for each batch size, as a PNG.

    Args:
        timings: Of one run; bars carry the ratio to the first subject.
        path: File to write; one that is there is replaced.

    Raises:
        OutputError: The folder cannot be written to.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    batches = list(dict.fromkeys(timing.batch for timing in timings))
    names = list(dict.fromkeys(timing.subject.name for timing in timings))
    figure = Figure(figsize=(8, 1.2 + 0.32 * (len(timings) + len(batches))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    ticks = []
    for group, batch in enumerate(batches):
        own = [timing for timing in timings if timing.batch == batch]
        start = group * (len(names) + 1)
        ticks.append(start + (len(own) - 1) / 2)
        for place, timing in enumerate(own):
            colour = COLOURS[names.index(timing.subject.name) % len(COLOURS)]
            label = timing.subject.name if group == 0 else None
            axes.barh(start + place, timing.throughput, color=colour, label=label)
            told = f" {timing.throughput:.3g}  ({timing.ratio:.2f}×)"
            axes.text(timing.throughput, start + place, told, va="center", fontsize=8)
    axes.set_yticks(ticks, [f"batch {batch}" for batch in batches])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(timing.throughput for timing in timings))
    axes.set_xlabel("images a second, median; in brackets as a multiple of the first")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", fontsize=8, frameon=False, ncols=min(2, len(names)))
    with writable_folder(path.parent) as folder:
        draft = folder / path.name
        figure.savefig(draft, dpi=DPI, facecolor="white", format="png")
        settle(draft)
        draft.replace(path)
