"""Drawn images of the offline tasks: shapes, counts, orientations, positions and colours.

Scenes are drawn in colour on an uneven, noisy background, at three times their size, and reduced.
Angles are in degrees, lengths in pixels of the finished image.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

__all__ = [
    "ANGLES",
    "HUES",
    "IMAGE_SIDE",
    "SHAPE_NAMES",
    "Canvas",
    "Scene",
    "colour_scene",
    "count_scene",
    "orientation_scene",
    "position_scene",
    "shape_scene",
]

IMAGE_SIDE = 64
"""Width and height of a finished image, in pixels."""

_OVERSAMPLING = 3  # the canvas is this many times wider than the image

_Rgb = tuple[int, int, int]
_Points = NDArray[np.float64]  # (..., 2), x to the right and y down

Scene = Callable[["Canvas", int], None]
"""Draws an image of a class, given by its index, on a canvas."""


class Canvas:
    """An uneven background, methods to draw on it, and the random generator of the scene."""

    def __init__(self, rng: Generator) -> None:
        self.rng = rng
        self.is_dark = bool(rng.random() < 0.5)
        low, high = (0.05, 0.4) if self.is_dark else (0.75, 1.0)
        # Pale colours on a grid of 3 x 3 points, interpolated in between.
        points = [
            _rgb(rng.random(), rng.uniform(0, 0.35), rng.uniform(low, high)) for _ in range(9)
        ]
        coarse = Image.fromarray(np.array(points, dtype=np.uint8).reshape(3, 3, 3))
        blended = coarse.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC)
        side = IMAGE_SIDE * _OVERSAMPLING
        self.image = blended.resize((side, side), Image.Resampling.NEAREST)
        self.pen = ImageDraw.Draw(self.image)

    def ink(self) -> _Rgb:
        """A contrasting colour: light on a dark background, dark on a light one."""
        low, high = (0.75, 1.0) if self.is_dark else (0.25, 0.55)
        return _rgb(self.rng.random(), self.rng.uniform(0.4, 1), self.rng.uniform(low, high))

    def put(self, outline: _Points, centre: _Points, angle: float, colour: _Rgb) -> None:
        """Fill an outline, rotated counter-clockwise and moved from the origin to ``centre``."""
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        points = outline @ np.array([(cos, -sin), (sin, cos)]) + centre
        self.pen.polygon((points * _OVERSAMPLING).ravel().tolist(), fill=colour)

    def put_shape(self, name: str, centre: _Points, radius: float, colour: _Rgb) -> None:
        """Fill one of ``SHAPE_NAMES`` at a random angle."""
        self.put(_SHAPES[name] * radius, centre, self.rng.uniform(0, 360), colour)

    def scatter_strokes(self, count: int) -> None:
        """Draw short thin strokes as distractors."""
        starts = self.rng.uniform(0, IMAGE_SIDE, (count, 2))
        ends = starts + self.rng.uniform(-7, 7, (count, 2))
        for line in (np.hstack([starts, ends]) * _OVERSAMPLING).tolist():
            self.pen.line(line, self.ink(), _OVERSAMPLING * 3 // 4)

    def finished(self) -> NDArray[np.uint8]:
        """The reduced image with Gaussian noise, uint8 of shape (64, 64, 3)."""
        pixels = np.asarray(self.image.reduce(_OVERSAMPLING))
        noise = self.rng.standard_normal(pixels.shape, dtype=np.float32)
        noisy: NDArray[np.float32] = pixels + noise * np.float32(self.rng.uniform(2, 10))
        return noisy.clip(0, 255).astype(np.uint8)


def _rgb(hue: float, saturation: float, value: float) -> _Rgb:
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def _star(radii: tuple[float, ...]) -> _Points:
    """Points around the origin at equal angles and the given distances, shape (n, 2)."""
    angles = np.arange(len(radii)) * (2 * math.pi / len(radii))
    return np.stack([np.cos(angles) * radii, np.sin(angles) * radii], axis=-1)


_CIRCLE = _star((1,) * 40)
_SHAPES = {  # outlines within the unit circle
    "circle": _CIRCLE,
    "cross": _star((0.37, 1, 1) * 4),
    "ring": np.concatenate([_CIRCLE, _CIRCLE[:1], _CIRCLE[:1] * 0.55, _CIRCLE[::-1] * 0.55]),
    "square": _star((1,) * 4),
    "star": _star((1, 0.4) * 5),
    "triangle": _star((1,) * 3),
}
SHAPE_NAMES = tuple(sorted(_SHAPES))
BAR = np.array([(-1.0, -1), (1, -1), (1, 1), (-1, 1)])
ANGLES = range(0, 180, 15)
HUES = {  # degrees on the colour circle
    "blue": 230,
    "cyan": 180,
    "green": 120,
    "magenta": 310,
    "orange": 28,
    "purple": 270,
    "red": 0,
    "yellow": 56,
}


def shape_scene(canvas: Canvas, label: int) -> None:
    """One shape at a random place, with random size, angle and colour."""
    canvas.scatter_strokes(12)
    radius = canvas.rng.uniform(10, 20)
    centre = canvas.rng.uniform(radius, IMAGE_SIDE - radius, 2)
    canvas.put_shape(SHAPE_NAMES[label], centre, radius, canvas.ink())


def count_scene(canvas: Canvas, label: int) -> None:
    """One to eight separate shapes."""
    canvas.scatter_strokes(8)
    centres: list[_Points] = []
    while len(centres) <= label:
        centre = canvas.rng.uniform(7, IMAGE_SIDE - 7, 2)
        if all(math.dist(centre, other) > 13 for other in centres):
            centres.append(centre)
    for centre in centres:
        radius = canvas.rng.uniform(4.5, 6)
        canvas.put_shape(_choose(canvas.rng, SHAPE_NAMES), centre, radius, canvas.ink())


def orientation_scene(canvas: Canvas, label: int) -> None:
    """One long bar, ellipse or diamond within 4 degrees of the class's angle, among dots."""
    rng = canvas.rng
    canvas.scatter_strokes(12)
    for _ in range(6):
        canvas.put_shape("circle", rng.uniform(0, IMAGE_SIDE, 2), rng.uniform(1.5, 3), canvas.ink())
    half = rng.uniform(15, 26)
    extent = np.array([half, half * rng.uniform(0.15, 0.28)])
    outline = (BAR, _CIRCLE, _SHAPES["square"])[int(rng.integers(3))] * extent
    angle = ANGLES[label] + rng.uniform(-4, 4)
    canvas.put(outline, rng.uniform(half, IMAGE_SIDE - half, 2), angle, canvas.ink())


def position_scene(canvas: Canvas, label: int) -> None:
    """A star in the class's cell of a 4 x 4 grid, and other shapes in some other cells."""
    rng = canvas.rng
    canvas.scatter_strokes(8)
    others = [cell for cell in rng.permutation(16)[:7].tolist() if cell != label]
    for cell in (label, *others):
        name = "star" if cell == label else _choose(rng, ("circle", "ring", "square", "triangle"))
        centre = np.array([cell % 4, cell // 4]) * 16 + rng.uniform(6.5, 9.5, 2)
        canvas.put_shape(name, centre, rng.uniform(5.5, 7), canvas.ink())


def colour_scene(canvas: Canvas, label: int) -> None:
    """One large shape of the class's hue, among small shapes of random colours."""
    rng = canvas.rng
    canvas.scatter_strokes(8)
    for _ in range(6):
        centre, radius = rng.uniform(0, IMAGE_SIDE, 2), rng.uniform(2, 4)
        canvas.put_shape(_choose(rng, SHAPE_NAMES), centre, radius, canvas.ink())
    hue = (HUES[sorted(HUES)[label]] + rng.uniform(-5, 5)) / 360 % 1
    radius = rng.uniform(12, 22)
    centre = rng.uniform(radius, IMAGE_SIDE - radius, 2)
    colour = _rgb(hue, rng.uniform(0.7, 1), rng.uniform(0.65, 1))
    canvas.put_shape(_choose(rng, SHAPE_NAMES), centre, radius, colour)


def _choose(rng: Generator, names: Sequence[str]) -> str:
    return names[int(rng.integers(len(names)))]
