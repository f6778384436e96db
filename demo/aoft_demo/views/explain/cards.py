"""How one task works inside, as HTML; all texts are escaped."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from html import escape

import numpy as np

from aoft_demo.actions.analysis import Family, TaskAnalysis
from aoft_demo.actions.attention import Attention, attention_overlay
from aoft_demo.actions.changes import Change, LayerWeights
from aoft_demo.views.charts import Bar, Line, bars, lines
from aoft_demo.views.explain.pictures import jpeg_address, weights_address
from aoft_demo.views.notices import note
from aoft_demo.views.parts import show_code
from aoft_demo.views.tables import numbers, shades

__all__ = ["attention_card", "inside_cards", "section"]

LEVELS = (1, 2, 5)
"""First digits of the factors by which small weights are amplified."""

LOW, HIGH, BINS = 45.0, 135.0, 120
"""First and last angle of the chart in degrees, and the number of bins from 0 to 180."""

COLOURS = {"backbone": 2, "LoRA": 3}
"""Colours of the families of vectors; those of the task have the first one."""


def section(title: str, sentence: str, body: str, level: int = 3) -> str:
    """A part of the page: a title, one sentence, and a chart; the body is HTML."""
    return (
        f'<section class="how"><h{level}>{escape(title)}</h{level}>'
        f'<p class="say">{escape(sentence)}</p>{body}</section>'
    )


def attention_card(name: str, attention: Attention) -> str:
    """Where the model looks in the picture, before and after fine-tuning."""
    figures = "".join(
        f'<figure class="look"><img src="{jpeg_address(attention_overlay(attention, grid))}" '
        f'alt="{escape(_described(attention, when, name, grid))}"/>'
        f"<figcaption><b>{when}</b> fine-tuning</figcaption></figure>"
        for when, grid in (("Before", attention.before), ("After", attention.after))
    )
    rows, columns = attention.after.shape
    moved = round(100 * attention.moved)
    now, then = _place(attention.after), _place(attention.before)
    if attention.after.argmax() == attention.before.argmax():
        brightest = f"the brightest patch is still on {now} of the picture"
    else:
        brightest = f"the brightest patch was on {then} of the picture, and is now on {now}"
    sentence = f"For {name}, fine-tuning moved {moved} % of the attention; {brightest}."
    scale = "<i></i>".join(
        f"<span>{100 * share * attention.most:.0f} %</span>" for share in (0, 0.25, 1)
    )
    scale = f'<p class="scale" aria-hidden="true">{scale}</p>'
    small = note(
        f"Bright patches get much attention of {attention.whose} in the last block, the mean over "
        f"its heads. The picture has {rows} × {columns} patches, and both maps have one colour "
        f"scale: the brightest patch has {100 * attention.most:.1f} % of the attention."
    )
    body = f'<div class="pair">{figures}</div>{scale}{small}'
    return section("Where it looks", sentence, body, level=2)


def _described(attention: Attention, when: str, name: str, grid: np.ndarray) -> str:
    row, column = np.unravel_index(int(grid.argmax()), grid.shape)
    rows, columns = grid.shape
    return (
        f"Attention of {attention.whose} {when.lower()} fine-tuning for {name}: highest at row "
        f"{row + 1} of {rows}, column {column + 1} of {columns}, with {100 * grid.max():.1f} %."
    )


def _place(grid: np.ndarray) -> str:
    """The place of the largest value in words."""
    row, column = np.unravel_index(int(grid.argmax()), grid.shape)
    down = ("upper", "middle", "lower")[int(3 * row / grid.shape[0])]
    across = ("left", "centre", "right")[int(3 * column / grid.shape[1])]
    return "the centre" if (down, across) == ("middle", "centre") else f"the {down} {across}"


def inside_cards(name: str, analysis: TaskAnalysis, change: Change) -> str:
    """What training changed, by how much, and in which directions."""
    parts = [_counts(name, change)]
    if analysis.layers:
        parts.append(_layers(analysis))
    if change.layer is not None:
        parts.append(_weights(change.layer))
    parts.append(_angles(analysis))
    notes = "".join(note(text) for text in analysis.notes)
    code = show_code(
        Shell=f"aoft-inspect {shlex.quote(f'{name}.ckpt')} --plots plots",
        Python=(
            "from pathlib import Path\n\n"
            "from aoft_deploy.training.analysis.quantities import analyse_file\n\n"
            f"analysis = analyse_file(Path({f'{name}.ckpt'!r}))\n"
            'print({kind: angles["sd"] for kind, angles in analysis["angles"].items()})'
        ),
    )
    return (
        f'<h2 class="inside">Inside {escape(name)}</h2>'
        f'<div class="two">{"".join(parts)}</div>{notes}{code}'
    )


def _counts(name: str, change: Change) -> str:
    share = change.trained / (change.total or 1)
    sentence = (
        f"Training set {change.trained:,} numbers for {name}; the model has {change.total:,}, and "
        f"all skills share them. That is {_per_cent(share)}."
    )
    rows = [
        Bar("the shared model", change.total, f"{change.total:,}", colour=2),
        Bar("this skill", change.trained, f"{change.trained:,}"),
        Bar("its list of answers", change.classifier, f"{change.classifier:,}"),
    ]
    chart = bars(rows, title="Numbers in the model, and numbers that were trained")
    return section("How little is trained", sentence, chart)


def _layers(analysis: TaskAnalysis) -> str:
    block, role, ratio = max(analysis.layers, key=lambda layer: layer[2])
    count = len(analysis.layers)
    sentence = (
        f"Training changed {count} of {count + analysis.unchanged} layers, most strongly {role} of "
        f"block {block}: there the change acts {ratio:.2g} times as strongly as the layer itself."
    )
    values = {(block, role): ratio for block, role, ratio in analysis.layers}
    chart = shades(values, title="Strength of each layer's change, ‖ΔW‖₂ / ‖W‖₂", row_name="block")
    return section("Where it changes the model", sentence, chart)


def _weights(layer: LayerWeights) -> str:
    most = float(np.quantile(np.abs(layer.before), 0.99)) or 1.0
    own = float(np.quantile(np.abs(layer.change), 0.99)) or most
    factor = _factor(most / own)
    shown = (
        ("W", "before", layer.before, most),
        (
            "ΔW",
            "the change" + (f", {factor} × stronger" if factor > 1 else ""),
            layer.change,
            most / factor,
        ),
        ("W + ΔW", "after", layer.before + layer.change, most),
    )
    rows, columns = layer.before.shape
    pictures = "".join(
        f'<figure><img src="{weights_address(weights, scale)}" alt="{escape(text)}: {rows} × '
        f"{columns} weights of {escape(layer.name)}, the largest is "
        f'{np.abs(weights).max():.2g}"/><figcaption><b>{title}</b> {escape(text)}</figcaption>'
        "</figure>"
        for title, text, weights, scale in shown
    )
    sentence = (
        "The finished file holds the sum of both, so the skill costs no time: here, the change is "
        f"{_per_cent(layer.ratio)} of the length of the weights."
    )
    small = note(
        f"The first {rows} × {columns} of {layer.shape[0]} × {layer.shape[1]} weights of "
        f"{layer.name}, the layer that changed most. Green is above zero, orange below."
    )
    return section(
        "One layer, before and after", sentence, f'<div class="three">{pictures}</div>{small}'
    )


def _factor(ratio: float) -> int:
    """The largest of 1, 2, 5, 10, 20 … that does not exceed a ratio."""
    known = [digit * 10**power for power in range(4) for digit in LEVELS]
    return max((factor for factor in known if factor <= ratio), default=1)


def _angles(analysis: TaskAnalysis) -> str:
    shown = list(_shown(analysis))
    curves = [
        Line(family.name, _rebinned(family), COLOURS.get(family.name.partition(",")[0], 1))
        for family in shown
    ]
    most = max((y for curve in curves for _, y in curve.points), default=1.0)
    chart = lines(
        curves,
        x=(LOW, HIGH),
        y=(0, most),
        x_label="angle between two vectors in degrees",
        y_label="How often each angle occurs",
        percent=True,
    )
    table = numbers(
        ("vectors", "mean", "spread (std. deviation)", "farthest from 90°", "pairs"),
        [
            (f.name, f"{f.mean:.1f}°", f"{f.sd:.2f}°", f"{f.farthest:.1f}°", f"{f.pairs:,}")
            for f in analysis.families
        ],
        title="The figures of all vectors",
    )
    small = note(
        f"Vectors are the rows or columns of weight matrices; a curve counts pairs of them in "
        f"steps of {180 / BINS:g} degrees."
        + (f" The LoRA of the comparison: {analysis.lora}." if analysis.lora else "")
    )
    return section("Directions of the change", _angles_sentence(shown), chart + small + table)


def _shown(analysis: TaskAnalysis) -> Iterator[Family]:
    """One family of the model, of the task and of LoRA, which can be compared."""
    by_name = {family.name: family for family in analysis.families}
    yield from (by_name[name] for name in ("backbone, rows",) if name in by_name)
    for kind in ("down", "prompts", "up"):
        if f"{analysis.method}, {kind}" in by_name:
            yield by_name[f"{analysis.method}, {kind}"]
            if f"LoRA, {kind}" in by_name:
                yield by_name[f"LoRA, {kind}"]
            return


def _angles_sentence(shown: Sequence[Family]) -> str:
    """What the curves say: how many pairs are near a right angle, and how far all spread."""
    names = ("the model's own", "this skill's", "a LoRA's")
    near = [f"of {name} {family.near:.0%}" for name, family in zip(names, shown, strict=False)]
    spread = [f"{family.sd:.1f}°" for family in shown]
    if len(shown) == 1:
        return (
            f"Vectors at right angles do not repeat each other: {near[0]} of the pairs are within "
            f"5° of a right angle. This method adds no vectors of its own."
        )
    return (
        f"Vectors at right angles do not repeat each other: {_listed(near)} of the pairs are "
        f"within 5° of a right angle. The spread of all angles is {_listed(spread)}."
    )


def _listed(texts: Sequence[str]) -> str:
    return f"{', '.join(texts[:-1])} and {texts[-1]}"


def _rebinned(family: Family) -> list[tuple[float, float]]:
    """Centre of each of fewer, equal bins in the chart, with its share of the pairs."""
    total = sum(family.counts) or 1
    width = 180 / len(family.counts)
    shares = [0.0] * BINS
    for i, count in enumerate(family.counts):
        shares[min(int((i + 0.5) * width / 180 * BINS), BINS - 1)] += count / total
    centres = ((i + 0.5) * 180 / BINS for i in range(BINS))
    return [(x, y) for x, y in zip(centres, shares, strict=True) if LOW <= x <= HIGH]


def _per_cent(share: float) -> str:
    """A share in per cent with two digits."""
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"
