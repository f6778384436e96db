"""The plots of an analysis: angles, spectral norms, deviation from orthogonality."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from aoft_deploy.drawing import PALETTE, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FILES", "draw"]

COLOURS = {
    "weight": PALETTE["grey"],
    "change": PALETTE["vermilion"],
    "down": PALETTE["blue"],
    "up": PALETTE["green"],
    "prompts": PALETTE["purple"],
}
"""Colour of each kind of matrix."""

MARKERS = {"weight": "o", "change": "D", "down": "v", "up": "^", "prompts": "s"}

FAMILIES = {
    "rows": ("weight", "rows of $W$"),
    "columns": ("weight", "columns of $W$"),
    "down": ("down", "columns of down"),
    "up": ("up", "columns of up"),
    "prompts": ("prompts", "prompts"),
}
"""Families of vectors: the kind of their matrix, and their name in a plot."""

NORMS = {
    "weight": "backbone $W$",
    "change": "change $ΔW$",
    "down": "down matrix",
    "up": "up matrix",
    "prompts": "prompts",
}

FILES = ("angles.png", "spectral_norms.png", "orthogonality.png")


def draw(analysis: Mapping[str, Any]) -> dict[str, Figure]:
    """The figures by file name; a plot without data is left out.

    Args:
        analysis: From ``analyse_file``.
    """
    title = f"{analysis['method']} on {analysis['backbone']['name']}"
    layers = analysis["layers"]
    figures = {}
    if analysis["angles"]:
        figures["angles.png"] = _draw_angles(analysis["angles"], title)
    changed = [x for x in layers if x["spectral_norms"].keys() - {"weight"}]
    if changed:
        figures["spectral_norms.png"] = _draw_norms(changed, title)
    generated = [x for x in layers if x["deviations"]]
    if generated:
        figures["orthogonality.png"] = _draw_deviations(generated, analysis["history"], title)
    return figures


def _figure(width: float, height: float, title: str) -> Figure:
    """An empty figure with a title, sized in inches."""
    figure = new_figure(width, height)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    return figure


def _style(axes: Axes, xlabel: str, ylabel: str) -> None:
    """Set the labels, the grid and the spines that all panels share."""
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8, length=3)
    axes.grid(True, linewidth=0.4, color="#d9d9d9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, axes: Axes, side: Literal["right upper", "upper right"]) -> None:
    """Add a legend outside the panels: beside or above them."""
    handles, labels = axes.get_legend_handles_labels()
    place: Any = f"outside {side}"
    figure.legend(handles, labels, loc=place, fontsize=8, frameon=False)


def _draw_angles(angles: Mapping[str, Any], title: str) -> Figure:
    """A histogram for each family of vectors, with the density expected of random vectors."""
    from matplotlib.ticker import MultipleLocator

    figure = _figure(8, 1 + 1.45 * len(angles), f"Angles between vectors: {title}")
    panels = figure.subplots(len(angles), 1, sharex=True, squeeze=False)[:, 0].tolist()
    half = _half_width([values["counts"] for values in angles.values()])
    for axes, (family, values) in zip(panels, angles.items(), strict=True):
        matrix, name = FAMILIES[family]
        counts, random = values["counts"], values["random_counts"]
        width = 180 / len(counts)
        edges = [i * width for i in range(len(counts) + 1)]
        percent = 100 / values["pairs"] / width
        axes.stairs([c * percent for c in counts], edges, fill=True, color=COLOURS[matrix])
        middles = [edge + width / 2 for edge in edges[:-1]]
        expected = [c * percent for c in random]
        axes.plot(
            middles, expected, ":", color="black", linewidth=1.2, label="independent random vectors"
        )
        _style(axes, "", "% per degree")
        _from_zero(axes, [*expected, *(c * percent for c in counts)])
        text = (
            f"{name}\n{values['matrices']} matrices, {_count(values['pairs'])} pairs\n"
            f"mean {values['mean']:.2f}°, sd {values['sd']:.2f}°\n"
            f"random vectors: sd {values['random_sd']:.2f}°\n"
            f"farthest from 90°: {values['farthest_from_90']:.1f}°"
        )
        axes.annotate(
            text, (1.02, 1.0), xycoords="axes fraction", fontsize=8, va="top", annotation_clip=False
        )
    panels[-1].set_xlim(90 - half, 90 + half)
    panels[-1].xaxis.set_major_locator(MultipleLocator(5 if half <= 25 else 15))
    panels[-1].set_xlabel("angle (degrees)", fontsize=9)
    _legend(figure, panels[0], "upper right")
    return figure


def _half_width(histograms: Sequence[Sequence[int]]) -> float:
    """Degrees on each side of 90 that hold 99.9 % of every histogram, at least 10."""
    widest = 10.0
    for counts in histograms:
        middle, width, total = len(counts) // 2, 180 / len(counts), sum(counts)
        reach = next(
            i
            for i in range(middle + 1)
            if sum(counts[middle - i : middle + i + 1]) >= 0.999 * total
        )
        widest = max(widest, reach * width)
    return min(90.0, 5 * math.ceil(widest / 5))


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1_000_000 else f"{number:,}"


def _draw_norms(layers: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """The norms of every layer, and below them the ratio of its change to its weight."""
    ratios = [layer["change_ratio"] for layer in layers]
    has_ratios = any(ratio is not None for ratio in ratios)
    width = max(7.0, 2.6 + 0.2 * len(layers))
    figure = _figure(width, 5.4 if has_ratios else 3.6, f"Spectral norms: {title}")
    heights = [2, 1] if has_ratios else [1]
    panels = figure.subplots(
        len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )[:, 0].tolist()
    norms = [layer["spectral_norms"] for layer in layers]
    for kind, name in NORMS.items():
        _dots(panels[0], [n.get(kind) or None for n in norms], kind, name)  # no log of zero
    _style(panels[0], "", "spectral norm")
    every = [value for n in norms for value in n.values() if value]
    if max(every, default=0) > 10 * min(every, default=0):
        _logarithmic(panels[0])
    else:
        _from_zero(panels[0], every)
    if has_ratios:
        percents = [None if ratio is None else 100 * ratio for ratio in ratios]
        _dots(panels[1], percents, "change", "")
        _style(panels[1], "", r"$\|ΔW\|_2\,/\,\|W\|_2$  (%)")
        _from_zero(panels[1], [p for p in percents if p is not None])
    _name_layers(panels, layers)
    _legend(figure, panels[0], "right upper")
    return figure


def _dots(axes: Axes, values: Sequence[float | None], kind: str, name: str) -> None:
    """Draw a marker for each layer that has a value."""
    points = [(i, value) for i, value in enumerate(values) if value is not None]
    if points:
        x, y = zip(*points, strict=True)
        style: dict[str, Any] = {"color": COLOURS[kind], "markersize": 4.5, "clip_on": False}
        axes.plot(x, y, MARKERS[kind], label=name, **style)


def _from_zero(axes: Axes, values: Sequence[float]) -> None:
    """Let the y axis run from zero to slightly above the largest value."""
    axes.set_ylim(0, 1.08 * max(values, default=0) or 1)


def _logarithmic(axes: Axes) -> None:
    """Use a logarithmic y axis, with decimal labels at 1, 2, 3 and 5 of each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)


def _name_layers(panels: Sequence[Axes], layers: Sequence[Mapping[str, Any]]) -> None:
    """Label the layers with roles and block numbers, and draw lines between blocks."""
    last = panels[-1]
    last.set_xticks(range(len(layers)), [layer["role"] for layer in layers])
    last.tick_params(axis="x", labelrotation=90)
    last.set_xlim(-0.7, len(layers) - 0.3)
    starts, middles, names = [], [], []
    for block, members in itertools.groupby(range(len(layers)), lambda i: layers[i]["block"]):
        positions = list(members)
        starts.append(positions[0] - 0.5)
        middles.append((positions[0] + positions[-1]) / 2)
        names.append(block)
    for axes in panels:
        axes.grid(False, axis="x")
        for start in starts[1:]:
            axes.axvline(start, color="#bfbfbf", linewidth=0.6, zorder=0)
    longest = max(len(layer["role"]) for layer in layers)
    below = last.secondary_xaxis(0.0)
    below.set_xticks(middles, names)
    below.tick_params(length=0, labelsize=8, pad=10 + 5 * longest)
    below.spines["bottom"].set_visible(False)
    below.set_xlabel("matrix, and number of its block", fontsize=9)


def _draw_deviations(
    layers: Sequence[Mapping[str, Any]], history: Sequence[Mapping[str, float]], title: str
) -> Figure:
    """The deviations over the epochs, if they are known, and those of every layer."""
    heading = f"Deviation from strict orthogonality: {title}"
    figure = _figure(max(7.0, 2.6 + 0.2 * len(layers)), 5.8 if history else 3.6, heading)
    panels = figure.subplots(2 if history else 1, 1, squeeze=False)[:, 0].tolist()
    quantity = r"max |AO$^\mathrm{T}$AO $-$ I|"
    kinds = list(layers[0]["deviations"])
    every = [value for layer in layers for value in layer["deviations"].values()]
    for kind in kinds:
        _dots(panels[-1], [layer["deviations"][kind] for layer in layers], kind, NORMS[kind])
    _style(panels[-1], "", quantity)
    _from_zero(panels[-1], every)
    _name_layers(panels[-1:], layers)
    if history:
        epochs = [line["epoch"] for line in history]
        for kind in kinds:
            mean = [line[f"deviation_{kind}_mean"] for line in history]
            most = [line[f"deviation_{kind}_max"] for line in history]
            axes, colour = panels[0], COLOURS[kind]
            name = NORMS[kind]
            axes.plot(epochs, most, "--", color=colour, linewidth=1, label=f"{name}, largest")
            style = {"color": colour, "marker": MARKERS[kind], "markersize": 4.5}
            axes.plot(epochs, mean, label=f"{name}, mean", **style)
        _style(panels[0], "epoch", quantity)
        _from_zero(
            panels[0], [value for line in history for k, value in line.items() if k != "epoch"]
        )
        panels[0].xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, panels[0], "right upper")
    return figure
