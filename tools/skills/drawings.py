"""Drawings by formulas: landscapes, sketches, charts, letters, houses, faces.

Each kind of drawing belongs to one part, so the kinds that are tested were never trained on.
Coordinates are in pixels of the finished picture.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFont
from skills.photographs import Part
from skills.pictures import SIDE

__all__ = ["KINDS", "Pen", "drawing"]

_Rgb = tuple[int, int, int]
_Points = list[tuple[float, float]]


class Pen:
    """Draws on a canvas that is larger than the finished picture by ``scale``.

    Args:
        rng: Random generator of the drawing.
        ground: Colour of the canvas.
        side: Width and height of the finished picture.
        scale: The canvas is this many times larger.

    Attributes:
        rng: As the argument.
        outline: Colour of the lines around filled shapes; None for none.
    """

    def __init__(self, rng: Generator, ground: _Rgb, side: int = SIDE, scale: int = 3) -> None:
        self.rng, self._side, self._scale = rng, side, scale
        self._unit = scale * side / SIDE
        self._image = Image.new("RGB", (side * scale, side * scale), ground)
        self._draw = ImageDraw.Draw(self._image)
        self.outline: _Rgb | None = (20, 20, 25) if rng.random() < 0.5 else None
        self._width = rng.uniform(0.7, 1.6)

    def polygon(self, points: _Points, fill: _Rgb | None) -> None:
        """A filled polygon with the outline, if there is one."""
        scaled = [(x * self._unit, y * self._unit) for x, y in points]
        if fill is not None:
            self._draw.polygon(scaled, fill=fill)
        if self.outline is not None or fill is None:
            self.line([*points, points[0], points[1]], self.outline or (20, 20, 25), self._width)

    def ellipse(self, x: float, y: float, across: float, down: float, fill: _Rgb | None) -> None:
        """A filled ellipse by its centre and radii."""
        angles = np.linspace(0, 2 * math.pi, 36, endpoint=False)
        self.polygon([(x + across * math.cos(a), y + down * math.sin(a)) for a in angles], fill)

    def box(self, left: float, top: float, right: float, bottom: float, fill: _Rgb | None) -> None:
        """A filled rectangle."""
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], fill)

    def line(self, points: _Points, colour: _Rgb, width: float) -> None:
        """A polyline with round joints."""
        scaled = [(x * self._unit, y * self._unit) for x, y in points]
        self._draw.line(scaled, colour, max(round(width * self._unit), 1), joint="curve")

    def text(self, x: float, y: float, text: str, size: float, colour: _Rgb) -> None:
        """Text by its centre, in the font of Pillow."""
        font = ImageFont.load_default(size * self._unit)
        self._draw.text((x * self._unit, y * self._unit), text, colour, font, anchor="mm")

    def finished(self) -> Image.Image:
        """The drawing, reduced to its size."""
        return self._image.reduce(self._scale)


def drawing(rng: Generator, part: Part, side: int = SIDE) -> Image.Image:
    """A drawing of one of the part's kinds."""
    kinds = KINDS[part]
    return kinds[int(rng.integers(len(kinds)))](rng, side)


def landscape(rng: Generator, side: int = SIDE) -> Image.Image:
    """Sky, sun, hills, and houses or trees."""
    pen = Pen(rng, _colour(rng, (0.5, 0.65), (0.15, 0.6), (0.75, 1)), side)
    if rng.random() < 0.7:
        radius = rng.uniform(4, 8)
        x, y = rng.uniform(8, 56), rng.uniform(7, 16)
        pen.ellipse(x, y, radius, radius, _colour(rng, (0.1, 0.16), (0.5, 1), (0.9, 1)))
    for level in np.sort(rng.uniform(26, 52, int(rng.integers(1, 4)))):
        slope, wave, phase = rng.uniform(-6, 6), rng.uniform(0, 6), rng.uniform(0, 6.3)
        top = [
            (x, level + slope * (x / 64 - 0.5) + wave * math.sin(phase + x / rng.uniform(9, 11)))
            for x in range(-2, 67, 4)
        ]
        pen.polygon([*top, (70, 70), (-6, 70)], _colour(rng, (0.2, 0.42), (0.3, 0.9), (0.35, 0.85)))
    for _ in range(int(rng.integers(1, 4))):
        x, y = rng.uniform(8, 56), rng.uniform(40, 56)
        (_house if rng.random() < 0.5 else _tree)(pen, x, y, rng.uniform(6, 12))
    return pen.finished()


def flat_shapes(rng: Generator, side: int = SIDE) -> Image.Image:
    """Polygons and ellipses in few flat colours."""
    palette = [_any_colour(rng) for _ in range(int(rng.integers(3, 6)))]
    pen = Pen(rng, palette[0], side)
    for _ in range(int(rng.integers(2, 12))):
        fill = palette[int(rng.integers(len(palette)))]
        x, y, radius = *rng.uniform(0, 64, 2), rng.uniform(4, 22)
        if rng.random() < 0.4:
            pen.ellipse(x, y, radius, radius * rng.uniform(0.5, 1), fill)
        else:
            angles = np.sort(rng.uniform(0, 6.28, int(rng.integers(3, 7))))
            pen.polygon(
                [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles], fill
            )
    return pen.finished()


def sketch(rng: Generator, side: int = SIDE) -> Image.Image:
    """Strokes of a pencil or felt-tip pen on paper."""
    dark = rng.random() < 0.15
    paper = int(rng.integers(15, 45)) if dark else int(rng.integers(225, 256))
    pen = Pen(rng, (paper, paper, max(paper - int(rng.integers(0, 25)), 0)), side)
    ink = (235, 235, 235) if dark else (25, 25, 30) if rng.random() < 0.6 else _any_colour(rng)
    for _ in range(int(rng.integers(3, 14))):
        heading, turn = rng.uniform(0, 6.28), rng.normal(0, 0.25)
        x, y = rng.uniform(6, 58, 2)
        points = [(x, y)]
        for _ in range(int(rng.integers(4, 26))):
            heading += turn + rng.normal(0, 0.15)
            x, y = x + 2.2 * math.cos(heading), y + 2.2 * math.sin(heading)
            points.append((x, y))
        pen.line(points, ink, rng.uniform(0.6, 2))
    return pen.finished()


def bars(rng: Generator, side: int = SIDE) -> Image.Image:
    """A bar chart with its axes."""
    pen = Pen(rng, _paper(rng), side)
    count, colours = int(rng.integers(3, 9)), [_any_colour(rng) for _ in range(2)]
    width = 52 / count
    for i in range(count):
        height = rng.uniform(4, 48)
        left = 8 + i * width
        pen.box(left, 56 - height, left + width * 0.75, 56, colours[i % int(rng.integers(1, 3))])
    pen.line([(7, 4), (7, 56), (62, 56)], (40, 40, 40), 1)
    return pen.finished()


def letters(rng: Generator, side: int = SIDE) -> Image.Image:
    """One to four large letters."""
    pen = Pen(rng, _paper(rng), side)
    count = int(rng.integers(1, 5))
    for _ in range(count):
        letter = chr(int(rng.integers(65, 91)) + 32 * int(rng.integers(2)))
        x, y = rng.uniform(14, 50, 2)
        pen.text(x, y, letter, rng.uniform(16, 60) / math.sqrt(count), _any_colour(rng))
    return pen.finished()


def pie(rng: Generator, side: int = SIDE) -> Image.Image:
    """A pie chart."""
    pen = Pen(rng, _paper(rng), side)
    radius = rng.uniform(18, 29)
    ends = np.sort(rng.uniform(0, 2 * math.pi, int(rng.integers(3, 7))))
    for start, stop in zip(ends, [*ends[1:], ends[0] + 2 * math.pi], strict=True):
        angles = np.linspace(start, stop, 20)
        arc = [(32 + radius * math.cos(a), 32 + radius * math.sin(a)) for a in angles]
        pen.polygon([(32, 32), *arc], _any_colour(rng))
    return pen.finished()


def flag(rng: Generator, side: int = SIDE) -> Image.Image:
    """Stripes with a star or disc, and a pole."""
    pen = Pen(rng, _paper(rng), side)
    count, upright = int(rng.integers(2, 6)), rng.random() < 0.5
    for i in range(count):
        low, high = 12 + 44 * i / count, 12 + 44 * (i + 1) / count
        left, top, right, bottom = (
            (low, 10, high, 44) if upright else (12, 0.8 * low, 58, 0.8 * high)
        )
        pen.box(left, top, right, bottom, _any_colour(rng))
    pen.ellipse(rng.uniform(20, 44), rng.uniform(18, 34), 6, 6, _any_colour(rng))
    pen.line([(11, 6), (11, 62)], (60, 50, 40), 2)
    return pen.finished()


def street(rng: Generator, side: int = SIDE) -> Image.Image:
    """A row of houses with windows."""
    pen = Pen(rng, _colour(rng, (0.5, 0.65), (0.05, 0.5), (0.8, 1)), side)
    left = rng.uniform(-6, 2)
    while left < 64:
        width, top = rng.uniform(10, 20), rng.uniform(14, 38)
        pen.box(left, top, left + width, 56, _any_colour(rng))
        roof = [(left, top), (left + width / 2, top - rng.uniform(4, 11)), (left + width, top)]
        pen.polygon(roof, _colour(rng, (0, 0.08), (0.4, 0.9), (0.4, 0.8)))
        for y in np.arange(top + 4, 50, 9):
            for x in np.arange(left + 2.5, left + width - 4, 6):
                pen.box(x, y, x + 3.5, y + 5, _colour(rng, (0.12, 0.6), (0.1, 0.4), (0.8, 1)))
        left += width + rng.uniform(0, 4)
    pen.box(-2, 56, 66, 66, _colour(rng, (0, 1), (0, 0.2), (0.3, 0.6)))
    return pen.finished()


def face(rng: Generator, side: int = SIDE) -> Image.Image:
    """A cartoon face with ears or hair."""
    pen = Pen(rng, _any_colour(rng), side)
    skin, x, y = _any_colour(rng), rng.uniform(26, 38), rng.uniform(29, 37)
    across, down = rng.uniform(15, 24), rng.uniform(16, 24)
    for sign in (-1, 1):
        if rng.random() < 0.5:
            pen.ellipse(x + sign * across * 0.8, y - down * 0.8, 7, 7, skin)
        else:
            ear = [
                (x + sign * across * k, y - down * h) for k, h in ((1, 0.3), (0.9, 1.3), (0.3, 0.8))
            ]
            pen.polygon(ear, skin)
    pen.ellipse(x, y, across, down, skin)
    for sign in (-1, 1):
        pen.ellipse(x + sign * across * 0.4, y - down * 0.2, 4, 5, (250, 250, 250))
        pen.ellipse(x + sign * across * 0.4, y - down * 0.1, 1.8, 2, (15, 15, 20))
    pen.ellipse(x, y + down * 0.2, 2.5, 2, _any_colour(rng))
    bend = rng.uniform(-3, 6)
    mouth = [
        (x + k * across * 0.5, y + down * 0.5 + bend * (1 - k * k)) for k in np.linspace(-1, 1, 9)
    ]
    pen.line(mouth, (40, 10, 15), 1.4)
    return pen.finished()


def curves(rng: Generator, side: int = SIDE) -> Image.Image:
    """A line chart with a grid."""
    pen = Pen(rng, _paper(rng), side)
    for step in range(12, 60, 11):
        pen.line([(8, step), (60, step)], (205, 205, 205), 0.5)
    for _ in range(int(rng.integers(1, 4))):
        heights = 32 + np.cumsum(rng.normal(0, 5, 14))
        points = [(8.0 + 4 * i, float(h)) for i, h in enumerate(heights.clip(6, 58))]
        pen.line(points, _any_colour(rng), rng.uniform(0.8, 2))
    pen.line([(7, 4), (7, 58), (62, 58)], (40, 40, 40), 1)
    return pen.finished()


def _house(pen: Pen, x: float, y: float, size: float) -> None:
    rng = pen.rng
    pen.box(x - size, y - size, x + size, y + size * 0.6, _any_colour(rng))
    roof = [(x - size * 1.2, y - size), (x, y - size * 2), (x + size * 1.2, y - size)]
    pen.polygon(roof, _colour(rng, (0, 0.1), (0.5, 1), (0.3, 0.9)))
    pen.box(x - size * 0.25, y - size * 0.2, x + size * 0.25, y + size * 0.6, (90, 60, 40))


def _tree(pen: Pen, x: float, y: float, size: float) -> None:
    leaves = _colour(pen.rng, (0.22, 0.4), (0.5, 1), (0.25, 0.7))
    pen.box(x - size * 0.15, y - size * 0.4, x + size * 0.15, y + size * 0.8, (100, 70, 40))
    if pen.rng.random() < 0.5:
        pen.ellipse(x, y - size, size * 0.8, size, leaves)
    else:
        crown = [(x - size * 0.8, y), (x, y - size * 2), (x + size * 0.8, y)]
        pen.polygon(crown, leaves)


def _colour(
    rng: Generator,
    hue: tuple[float, float],
    saturation: tuple[float, float],
    value: tuple[float, float],
) -> _Rgb:
    red, green, blue = colorsys.hsv_to_rgb(
        *(rng.uniform(*span) for span in (hue, saturation, value))
    )
    return round(red * 255), round(green * 255), round(blue * 255)


def _any_colour(rng: Generator) -> _Rgb:
    return _colour(rng, (0, 1), (0.05, 1), (0.15, 1))


def _paper(rng: Generator) -> _Rgb:
    return _colour(rng, (0, 1), (0, 0.08), (0.92, 1)) if rng.random() < 0.8 else _any_colour(rng)


KINDS: dict[Part, tuple[Callable[[Generator, int], Image.Image], ...]] = {
    "train": (landscape, flat_shapes, sketch, bars, letters),
    "val": (pie, flag),
    "test": (street, face, curves),
}
"""The kinds of drawings of each part."""
