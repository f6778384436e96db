"""Plot of the throughput of artefacts, in images per second, by batch size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from aoft_deploy.artefacts.timing import Timing
from aoft_deploy.drawing import PALETTE, new_figure, save_figure
from aoft_deploy.files import settle, writable_folder

__all__ = ["draw_throughput"]

COLOURS = tuple(PALETTE.values())
"""Colours of the artefacts, in order."""


def draw_throughput(timings: Sequence[Timing], path: Path) -> None:
    """Write a PNG file with horizontal bars, grouped by batch size.

    Args:
        timings: The timings of one run. Each bar shows its ratio to the first subject.
        path: The PNG file; an existing one is replaced.

    Raises:
        OutputError: The folder cannot be written to.
    """
    batches = list(dict.fromkeys(timing.batch for timing in timings))
    names = list(dict.fromkeys(timing.subject.name for timing in timings))
    figure = new_figure(8, 1.2 + 0.32 * (len(timings) + len(batches)))
    axes = figure.subplots()
    ticks = []
    for group, batch in enumerate(batches):
        bars = [timing for timing in timings if timing.batch == batch]
        start = group * (len(names) + 1)
        ticks.append(start + (len(bars) - 1) / 2)
        for row, timing in enumerate(bars):
            colour = COLOURS[names.index(timing.subject.name) % len(COLOURS)]
            label = timing.subject.name if group == 0 else None
            axes.barh(start + row, timing.throughput, color=colour, label=label)
            text = f" {timing.throughput:.3g}  ({timing.ratio:.2f}×)"
            axes.text(timing.throughput, start + row, text, va="center", fontsize=8)
    axes.set_yticks(ticks, [f"batch {batch}" for batch in batches])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(timing.throughput for timing in timings))
    axes.set_xlabel("images per second, median; in brackets as a multiple of the first")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", fontsize=8, frameon=False, ncols=min(2, len(names)))
    with writable_folder(path.parent) as folder:
        draft = folder / path.name
        save_figure(figure, draft)
        settle(draft)
        draft.replace(path)
