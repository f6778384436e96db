"""Figures drawn from formulas: glyphs, radial contours, fractals and Lissajous curves.

A formula is created once per class, and each of its instances is drawn with jitter. Points lie in
[-1, 1].
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

Array = NDArray[np.float64]

CANVAS = 80  # side of an ink map in pixels; the figure fills about 60 of them
FAMILIES = {"stroke": 288, "contour": 112, "fractal": 64, "lissajous": 48}  # number of formulas
CLASSES = sum(FAMILIES.values())


def spline(points: Array, steps: int = 10) -> Array:
    """Sample the Catmull-Rom spline through `points`, [n, 2] to [(n - 1) * steps + 1, 2]."""
    p = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    t = np.linspace(0, 1, steps, endpoint=False)[:, None, None]
    a, b, c, d = p[:-3], p[1:-2], p[2:-1], p[3:]
    curve = b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    return np.concatenate([curve.transpose(1, 0, 2).reshape(-1, 2), points[-1:]])


def stroke_formula(rng: np.random.Generator) -> list[tuple[str, Array]]:
    """Create a glyph: one to three strokes, each a spline, polyline or arc, with its points."""
    count = int(rng.choice([1, 2, 3], p=[0.45, 0.4, 0.15]))
    kinds = ["spline", "spline", "line"] if count == 1 else ["spline", "line", "arc"]
    strokes = []
    for kind in rng.choice(kinds, count):
        if kind == "arc":  # centre, radii, first angle, extent
            extent = rng.choice([2 * np.pi, rng.uniform(2, 5.5)])
            radii, first = rng.uniform(0.25, 0.6, 2), rng.uniform(0, 2 * np.pi)
            strokes.append((kind, np.array([*rng.uniform(-0.5, 0.5, 2), *radii, first, extent])))
        else:
            n = rng.integers(3, 7) if count == 1 else rng.integers(2, 5)
            strokes.append((kind, far_apart(rng.uniform(-1, 1, (50, 2)))[:n]))
    return strokes


def far_apart(points: Array) -> Array:
    """Drop points that are close to the previous one."""
    kept = [points[0]]
    for p in points[1:]:
        if np.abs(p - kept[-1]).max() > 0.6:
            kept.append(p)
    return np.array(kept)


def draw_stroke(formula: list[tuple[str, Array]], rng: np.random.Generator) -> Image.Image:
    """Draw a glyph with jittered control points and a random pen."""
    image = blank()
    draw = ImageDraw.Draw(image)
    width, wobble, curves = int(rng.integers(5, 20)), rng.uniform(0.03, 0.12), []
    for kind, points in formula:
        p = points + rng.normal(0, wobble, points.shape)
        if kind == "arc":
            angle = p[4] + np.linspace(0, p[5], 40)
            p = np.stack([p[0] + p[2] * np.cos(angle), p[1] + p[3] * np.sin(angle)], 1)
        elif kind == "spline" and len(p) > 2:
            p = spline(p)
        curves.append(p)
    low, high = np.concatenate(curves).min(0), np.concatenate(curves).max(0)
    for p in curves:
        line(draw, 0.9 * (2 * p - low - high) / max(high - low), width)
    return image


def contour_formula(rng: np.random.Generator) -> dict[str, Any]:
    """Create a radial contour: polygon or wave, number of rings, filled or not."""
    k = np.arange(2, 8)
    return {
        "n": int(rng.integers(3, 13)),
        "wave": rng.normal(0, 0.35, 6) / k * rng.choice([0, 1, 1]),
        "phase": rng.uniform(0, 6.28, 6),
        "smooth": bool(rng.random() < 0.4),
        "spike": float(rng.choice([0, 0, 0.3, 0.5])),
        "rings": int(rng.choice([1, 1, 1, 2, 3, 5])),
        "filled": bool(rng.random() < 0.4),
        "drift": rng.uniform(-0.25, 0.25, 2),
    }


def draw_contour(formula: dict[str, Any], rng: np.random.Generator) -> Image.Image:
    """Draw the rings of a radial contour, shrinking and drifting from ring to ring."""
    image = blank()
    draw = ImageDraw.Draw(image)
    n, width = formula["n"], int(rng.integers(3, 10))
    corners = 2 * n if formula["spike"] else n
    angle = np.linspace(0, 2 * np.pi, 72 if formula["smooth"] else corners, endpoint=False)
    k = np.arange(2, 8)[:, None]
    wave = formula["wave"] * (1 + rng.normal(0, 0.15, 6))
    radius = 1 + (wave[:, None] * np.cos(k * angle + formula["phase"][:, None])).sum(0)
    if formula["spike"]:
        comb = np.cos(n * angle) if formula["smooth"] else (-1.0) ** np.arange(len(angle))
        radius = radius - formula["spike"] * (0.5 - 0.5 * comb)
    radius = 0.9 * radius / radius.max() * (1 + rng.normal(0, 0.03, len(angle)))
    outline = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)
    for ring in range(formula["rings"]):
        scale = 1 - ring / (formula["rings"] + 0.5)
        p = outline * scale + formula["drift"] * (1 - scale)
        if formula["filled"]:
            draw.polygon(pixels(p), fill=0 if ring % 2 else 255)
        else:
            line(draw, np.concatenate([p, p[:2]]), width)
    return image


def fractal_formula(rng: np.random.Generator) -> dict[str, Array]:
    """Create a contracting iterated function system of two to five affine maps."""
    m = int(rng.integers(2, 6))
    a, b = rng.uniform(-np.pi, np.pi, (2, m))
    s = np.sort(rng.uniform(0.25, 0.85, (m, 2)), 1)[:, ::-1]
    rotate = [np.stack([np.cos(t), -np.sin(t), np.sin(t), np.cos(t)], 1) for t in (a, b)]
    left, right = (r.reshape(m, 2, 2) for r in rotate)
    matrix = left @ (s[:, :, None] * right)
    share = np.abs(np.linalg.det(matrix)) + 0.05
    return {"A": matrix, "b": rng.uniform(-1, 1, (m, 2)), "p": share / share.sum()}


def draw_fractal(formula: dict[str, Array], rng: np.random.Generator) -> Image.Image:
    """Draw the attractor with 200 parallel walks of the chaos game, as thick dots."""
    matrix = formula["A"] * rng.uniform(0.92, 1.06, formula["A"].shape)
    x, seen = rng.normal(0, 0.1, (200, 2)), []
    for step in range(22):
        i = rng.choice(len(matrix), 200, p=formula["p"])
        x = np.clip((matrix[i] @ x[:, :, None])[:, :, 0] + formula["b"][i], -50, 50)
        if step > 7:
            seen.append(x)
    points = np.concatenate(seen)
    low, high = np.percentile(points, [1, 99], axis=0)
    points = (points - (low + high) / 2) / max((high - low).max() / 2, 1e-3) * 0.9
    ij = np.clip(np.rint((points + 1) / 2 * 60 + 10), 0, CANVAS - 1).astype(int)
    ink = np.zeros((CANVAS, CANVAS), np.uint8)
    ink[ij[:, 1], ij[:, 0]] = 255
    if rng.random() < 0.6:
        ink = np.maximum.reduce([ink, np.roll(ink, 1, 0), np.roll(ink, 1, 1)])
    return Image.fromarray(ink)


def lissajous_formula(rng: np.random.Generator) -> Array:
    """Create (frequency x, frequency y, phase, inner frequency, inner amplitude)."""
    inner, amplitude = rng.integers(2, 8), rng.choice([0, rng.uniform(0.2, 0.5)])
    return np.array([*rng.integers(1, 5, 2), rng.uniform(0, 3.14), inner, amplitude])


def draw_lissajous(formula: Array, rng: np.random.Generator) -> Image.Image:
    """Draw one period of a Lissajous curve, modulated by a smaller circle."""
    fx, fy, phase, inner, amplitude = formula
    t = np.linspace(0, 2 * np.pi, 120)
    phase, amplitude = phase + rng.normal(0, 0.08), amplitude * rng.uniform(0.8, 1.2)
    p = np.stack([np.sin(fx * t + phase), np.sin(fy * t)], 1)
    p += amplitude * np.stack([np.cos(inner * t), np.sin(inner * t)], 1)
    image = blank()
    line(ImageDraw.Draw(image), 0.9 * p / np.abs(p).max(), int(rng.integers(3, 10)))
    return image


def blank() -> Image.Image:
    """Return an empty canvas of twice the size, for anti-aliasing."""
    return Image.new("L", (2 * CANVAS, 2 * CANVAS))


def pixels(points: Array) -> list[tuple[float, float]]:
    """Map [-1, 1] to the middle three quarters of a double-size canvas."""
    return [(x, y) for x, y in (points + 1) * 60 + 20]


def line(draw: ImageDraw.ImageDraw, points: Array, width: int) -> None:
    """Draw a polyline with round joints."""
    draw.line(pixels(points), fill=255, width=width, joint="curve")


DRAW: dict[str, tuple[Any, Any]] = {
    "stroke": (stroke_formula, draw_stroke),
    "contour": (contour_formula, draw_contour),
    "fractal": (fractal_formula, draw_fractal),
    "lissajous": (lissajous_formula, draw_lissajous),
}


def draw_pool(instances: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw every formula `instances` times.

    Returns:
        Ink maps, uint8 [512, instances, 80, 80], and the family of each class, [512].
    """
    pool = np.zeros((CLASSES, instances, CANVAS, CANVAS), np.uint8)
    family: list[int] = []
    for number, (name, classes) in enumerate(FAMILIES.items()):
        make, draw = DRAW[name]
        for _ in range(classes):
            rng = np.random.default_rng([seed, len(family)])
            formula = make(rng)
            for i in range(instances):
                image = draw(formula, rng)
                pool[len(family), i] = image if image.width == CANVAS else image.reduce(2)
            family.append(number)
    return torch.from_numpy(pool), torch.tensor(family)
