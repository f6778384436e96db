"""One clear object on a plain ground, by formulas: its colour, shape, size, place and tilt."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from skills.pictures import SIDE, Picture

__all__ = [
    "COLOURS",
    "NAMED_SHAPES",
    "PLACES",
    "SHAPES",
    "SIZES",
    "TILTS",
    "Thing",
    "ground",
    "scene",
]

_SCALE = 3
_Rgb = tuple[int, int, int]
_Points = NDArray[np.float64]  # (corners, 2), x to the right and y down, within the unit circle

COLOURS: Mapping[str, tuple[float, float] | None] = {
    "red": (-10, 6),
    "orange": (22, 34),
    "yellow": (48, 60),
    "green": (90, 150),
    "blue": (200, 238),
    "purple": (265, 290),
    "black": None,
    "white": None,
}
"""Hues of each colour in degrees; black and white have none."""

SIZES: Mapping[str, tuple[float, float]] = {
    "small": (4.5, 7.5),
    "medium": (12, 16),
    "large": (23, 29),
}
"""Radii of the circle around the object, in pixels of 64."""

PLACES: Mapping[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "top left": ((9, 23), (9, 23)),
    "top right": ((41, 55), (9, 23)),
    "centre": ((28, 36), (28, 36)),
    "bottom left": ((9, 23), (41, 55)),
    "bottom right": ((41, 55), (41, 55)),
}
"""Where the object's centre lies, across and down, in pixels of 64."""

TILTS: Mapping[str, float] = {
    "upright": 90,
    "lying flat": 0,
    "leaning right": 45,
    "leaning left": 135,
}
"""Angles of long objects above the horizon, in degrees."""


def _star(radii: tuple[float, ...], turn: float = 0.0) -> _Points:
    angles = np.arange(len(radii)) * (2 * math.pi / len(radii)) + turn
    return np.stack([np.cos(angles) * radii, np.sin(angles) * radii], axis=1)


def _heart() -> _Points:
    t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    across = 16 * np.sin(t) ** 3
    down = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([across, down - 2.5], axis=1) / 16


_UP = -math.pi / 2  # a corner at the top
SHAPES: Mapping[str, _Points] = {
    "circle": _star((1.0,) * 48),
    "square": _star((1.0,) * 4, math.pi / 4),
    "triangle": _star((1.0,) * 3, _UP),
    "star": _star((1.0, 0.42) * 5, _UP),
    "heart": _heart(),
}
"""Outlines of the shapes."""

NAMED_SHAPES = ("circle", "square", "triangle", "star")
"""The shapes that a skill names; hearts are drawn for the other questions only."""

_LONG: tuple[_Points, ...] = (
    _star((1.0,) * 48),
    np.array([(-1.0, -1), (1, -1), (1, 1), (-1, 1)]),
    np.array([(-1.0, -1), (0.65, -1), (1, 0), (0.65, 1), (-1, 1)]),
    np.array([(-1.0, 0), (0, -1), (1, 0), (0, 1)]),
)
"""Outlines of long objects, to be made narrow: ellipse, bar, pencil, diamond."""


@dataclass(frozen=True)
class Thing:
    """What the object is; None chooses at random.

    Attributes:
        colour: One of ``COLOURS``.
        shape: One of ``SHAPES``.
        size: One of ``SIZES``.
        place: One of ``PLACES``.
        tilt: One of ``TILTS``, of a long object; None for an object of a shape.
    """

    colour: str | None = None
    shape: str | None = None
    size: str | None = None
    place: str | None = None
    tilt: str | None = None


def scene(rng: Generator, thing: Thing, side: int = SIDE) -> Picture:
    """The object on its ground, float32 of shape (side, side, 3)."""
    colour = thing.colour or _choice(rng, COLOURS)
    back, fill = _contrasting(rng, colour)
    image = ground(rng, back, side * _SCALE)
    least, most = SIZES[thing.size] if thing.size else (13, 27) if thing.shape else (9, 26)
    radius = rng.uniform(least, most)
    if thing.place:
        radius = radius if thing.size else min(radius, 15.0)
        x, y = (rng.uniform(*span) for span in PLACES[thing.place])
    else:
        low = min(radius * 0.95, 31.0)
        x, y = rng.uniform(low, SIDE - low, 2)
    unit = _SCALE * side / SIDE
    outline = _outline(rng, thing) * radius
    if thing.size and not thing.tilt:
        outline *= radius / np.hypot(*outline.T).max()
    points = (outline + np.array([x, y])) * unit
    _paint(rng, image, points, fill, radius * unit)
    pixels = np.asarray(image.reduce(_SCALE), np.float32)
    return (pixels + rng.normal(0, rng.uniform(0, 6), pixels.shape)).astype(np.float32)


def ground(rng: Generator, colour: NDArray[np.float64], side: int) -> Image.Image:
    """A plain ground: one colour, a soft gradient, or a soft unevenness."""
    spread = rng.choice([0.0, rng.uniform(4, 22)])
    points = colour + rng.normal(0, 1, (3, 3, 1)) * spread + rng.normal(0, 0.3, (3, 3, 3)) * spread
    coarse = Image.fromarray(points.clip(0, 255).astype(np.uint8))
    return coarse.resize((side, side), Image.Resampling.BICUBIC)


def _outline(rng: Generator, thing: Thing) -> _Points:
    """The outline within the unit circle, turned."""
    if thing.tilt:
        outline = _LONG[int(rng.integers(len(_LONG)))] * (1.0, rng.uniform(0.16, 0.32))
        angle = TILTS[thing.tilt] + rng.uniform(-11, 11) + 180 * int(rng.integers(2))
    else:
        outline = SHAPES[thing.shape or _choice(rng, SHAPES)]
        angle = rng.uniform(-18, 18)
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    turned: _Points = outline @ np.array([(cos, -sin), (sin, cos)])
    return turned


def _paint(rng: Generator, image: Image.Image, points: _Points, fill: _Rgb, radius: float) -> None:
    """Paint the object: flat or shaded, with a shadow or an outline or neither."""
    flat = points.ravel().tolist()
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).polygon(flat, fill=255)
    if rng.random() < 0.35:
        shift = radius * rng.uniform(0.08, 0.2)
        shadow = Image.new("L", image.size)
        ImageDraw.Draw(shadow).polygon(
            (points + np.array([shift * rng.choice([-1, 1]), shift])).ravel().tolist(),
            fill=int(rng.integers(50, 120)),
        )
        image.paste((0, 0, 0), mask=shadow.filter(ImageFilter.GaussianBlur(radius * 0.12)))
    image.paste(fill, mask=mask)
    if rng.random() < 0.5:  # light from one side
        x, y = points.mean(0) + radius * rng.uniform(-0.5, 0.5, 2)
        span = np.arange(image.width, dtype=np.float32)
        distance = np.hypot(span[None] - x, span[:, None] - y) / radius
        bright = rng.random() < 0.6
        strength = rng.uniform(0.15, 0.45) * 255
        level = (1 - distance) if bright else (distance - 0.4)
        amount = Image.fromarray((level.clip(0, 1) * strength).astype(np.uint8))
        amount = Image.fromarray(np.minimum(np.asarray(amount), np.asarray(mask)))
        image.paste((255, 255, 255) if bright else (0, 0, 0), mask=amount)
    if rng.random() < 0.25:
        edge = (15, 15, 20) if sum(fill) > 200 else (235, 235, 235)
        width = max(round(radius * rng.uniform(0.05, 0.12)), 1)
        ImageDraw.Draw(image).line([*flat, *flat[:4]], edge, width, joint="curve")


def _contrasting(rng: Generator, colour: str) -> tuple[NDArray[np.float64], _Rgb]:
    """Colours of the ground and of the object that differ clearly."""
    fill = np.array(_shade(rng, colour), float)
    while True:
        pale = rng.random() < 0.75
        saturation = rng.uniform(0, 0.18) if pale else rng.uniform(0.2, 0.7)
        back = np.array(_hsv(rng.uniform(0, 360), saturation, rng.uniform(0.08, 1)), float)
        if np.abs(back - fill).mean() > 70:
            red, green, blue = (int(value) for value in fill)
            return back, (red, green, blue)


def _shade(rng: Generator, colour: str) -> _Rgb:
    """A shade of a colour that everybody calls by its name."""
    span = COLOURS[colour]
    if colour == "black":
        return _hsv(rng.uniform(0, 360), rng.uniform(0, 0.3), rng.uniform(0.02, 0.13))
    if span is None:
        return _hsv(rng.uniform(0, 360), rng.uniform(0, 0.04), rng.uniform(0.93, 1))
    value = (0.85, 1.0) if colour in ("orange", "yellow") else (0.55, 1.0)
    return _hsv(rng.uniform(*span), rng.uniform(0.72, 1), rng.uniform(*value))


def _hsv(hue: float, saturation: float, value: float) -> _Rgb:
    red, green, blue = colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def _choice(rng: Generator, names: Mapping[str, object]) -> str:
    return list(names)[int(rng.integers(len(names)))]
