"""The proof that a task's answers are the same, as HTML; all texts are escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from shlex import quote

from aoft_demo.actions.verification import Proof
from aoft_demo.views.parts import show_code
from aoft_demo.views.units import decimal

__all__ = ["START", "proof_card"]

START = (
    '<div role="status"><h2>Prove it</h2></div><p class="note">Choose “Prove it” beside a skill. '
    "Three models answer the same pictures: the trained model, the one merged into plain weights, "
    "and the one that shares its weights here.</p>"
)

CLASSES = 6
"""Classes that are drawn: those with the largest values."""

MODELS = (("trained", "unmerged"), ("merged", "merged"), ("shared, here", "fleet"))
"""The models' names on the page, and in ``Proof``."""


def proof_card(name: str, proof: Proof) -> str:
    """The values of the three models for the visitor's picture, and the differences of all."""
    good = proof.proved
    verdict = (
        f"The answers are the same, to {proof.digits} digits."
        if good
        else "The answers differ: see below."
    )
    colour = "good" if good else "bad"
    pictures = len(proof.unmerged)
    return (
        f'<div data-task="{escape(name)}"><div role="status"><h2>{escape(name)}</h2>'
        f'<p class="verdict {colour}"><b>{verdict}</b> {proof.agreeing} of {pictures} pictures '
        "are answered alike by all three.</p></div>"
        f'<p class="note">Values for your picture; {pictures - 1} built-in pictures were compared '
        f"too.</p>{_values(proof)}{_scale(proof)}{_code(name)}</div>"
    )


def _values(proof: Proof) -> str:
    """A row for each of the largest classes, with a bar for each model."""
    first = proof.unmerged[0]
    order = sorted(range(len(first)), key=lambda i: -first[i])[:CLASSES]
    low = min(0.0, *(float(first[i]) for i in order))
    high = max(0.0, *(float(first[i]) for i in order))
    span = (high - low) or 1.0
    head = "".join(f"<th scope='col'>{model}</th>" for model, _ in MODELS)
    rows = "".join(
        f"<tr><th scope='row'>{escape(proof.classes[i])}</th>"
        + "".join(_cell(float(getattr(proof, field)[0][i]), low, span) for _, field in MODELS)
        + "</tr>"
        for i in order
    )
    return (
        '<div class="values" tabindex="0" role="region" aria-label="Values"><table>'
        '<caption class="hidden">Values of the classes</caption>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cell(value: float, low: float, span: float) -> str:
    left = 100 * (min(value, 0.0) - low) / span
    width = max(100 * abs(value) / span, 1)
    style = f"margin-left:{left:.1f}%;width:{min(width, 100 - left):.1f}%"
    return (
        f'<td data-value="{value:.9g}"><span class="bar"><i class="b1" style="{style}"></i></span>'
        f"<span>{value:.6f}</span></td>"
    )


def _scale(proof: Proof) -> str:
    """The largest differences on a logarithmic scale, beside the tolerance and float32's step."""
    marks = (
        ("merged", proof.merged_difference, "merged differs by"),
        ("fleet", proof.fleet_difference, "shared here differs by"),
        ("step", proof.rounding, "32-bit rounding step"),
        ("tolerance", proof.tolerance, "tolerance of exports"),
        ("largest", proof.largest, "largest value"),
    )
    exponents = [math.log10(value) for _, value, _ in marks if value > 0]
    low, high = math.floor(min(exponents)) - 0.5, max(exponents) + 0.2
    rows = "".join(_mark(kind, value, text, low, high) for kind, value, text in marks)
    ticks = _ticks(range(math.ceil(low), math.floor(high) + 1), low, high)
    return (
        '<figure class="scale"><figcaption>Differences on a scale of powers of ten</figcaption>'
        f"{rows}<div class='line ticks' aria-hidden='true'><span></span><span>{ticks}</span>"
        "<span></span></div></figure>"
    )


def _mark(kind: str, value: float, text: str, low: float, high: float) -> str:
    place = 0.0 if value <= 0 else 100 * (math.log10(value) - low) / (high - low)
    colour = "b1" if kind in ("merged", "fleet") else "b2"
    return (
        f'<div class="line" data-mark="{kind}" data-value="{value:.9g}"><span class="name">{text}'
        f'</span><span class="bar"><i class="{colour}" style="width:{place:.1f}%"></i></span>'
        f'<span class="value">{decimal(value)}</span></div>'
    )


def _ticks(exponents: Sequence[int], low: float, high: float) -> str:
    step = max(1, len(exponents) // 4)
    return "".join(
        f"<i style='left:{100 * (exponent - low) / (high - low):.1f}%'>10<sup>{exponent}</sup></i>"
        for exponent in exponents[::step]
    )


def _code(name: str) -> str:
    file = f"{name}.ckpt"
    return show_code(
        Shell=f"aoft-export --merge {quote(file)} -o merged.onnx  # compares, and writes the proof",
        Python=f"""
import torch
from aoft_deploy import load, merge
from aoft_deploy.checkpoints.checkpoint import read_checkpoint
from aoft_deploy.data.images import read_image

tuned = load({file!r}).eval()
preprocessing = read_checkpoint({file!r}).preprocessing
row = torch.from_numpy(preprocessing(read_image("picture.png"))[None])
with torch.inference_mode():
    print((tuned(row) - merge(tuned).eval()(row)).abs().max())
""",
    )
