"""Pictures from formulas with the statistics of photographs: dead leaves and clouds.

Dead leaves (Matheron 1968; Lee, Mumford and Huang 2001) are shapes of all sizes that cover each
other, as things in the world do. Clouds have a spectrum that falls with the frequency, as the
spectra of photographs do.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from skills.pictures import SIDE, Picture

__all__ = ["clouds", "dead_leaves", "texture"]

_SCALE = 3  # drawn this many times larger and reduced


def texture(rng: Generator) -> Picture:
    """Dead leaves or clouds."""
    return dead_leaves(rng) if rng.random() < 0.75 else clouds(rng)


def clouds(rng: Generator) -> Picture:
    """Three channels that share most of a random field of falling spectrum."""
    power = rng.uniform(1.0, 2.2)
    shared, own = _field(rng, power, 1), _field(rng, power, 3)
    mix = rng.uniform(0, 0.7)
    colour = rng.uniform(60, 190, 3) * rng.uniform(0.3, 1)
    found = colour + rng.uniform(15, 60) * ((1 - mix) * shared + mix * own)
    return found.clip(0, 255).astype(np.float32)


def dead_leaves(rng: Generator) -> Picture:
    """Discs, ellipses and polygons with radii of the density r⁻³, shaded and lightly textured."""
    side = SIDE * _SCALE
    palette = rng.uniform(0, 255, (int(rng.integers(3, 9)), 3)) * rng.uniform(0.4, 1)
    strength = rng.uniform(0, 1)
    palette = palette * strength + palette.mean(1, keepdims=True) * (1 - strength)
    image = Image.new("RGB", (side, side), _rgb(palette[0]))
    pen = ImageDraw.Draw(image)
    least, most = rng.uniform(1.5, 5) * _SCALE, rng.uniform(14, 34) * _SCALE
    for _ in range(int(rng.integers(60, 350))):
        share = rng.random()
        radius = 1 / math.sqrt(share / least**2 + (1 - share) / most**2)
        _leaf(pen, rng, radius, _rgb(palette[rng.integers(len(palette))] + rng.normal(0, 14, 3)))
    pixels = np.asarray(image.reduce(_SCALE), np.float32)
    shade = 1 + rng.uniform(0, 0.35) * _field(rng, 2.0, 1) / 2
    grain = rng.uniform(0, 9) * _field(rng, rng.uniform(0.3, 1.2), 1)
    return (pixels * shade + grain).clip(0, 255).astype(np.float32)


def _leaf(pen: ImageDraw.ImageDraw, rng: Generator, radius: float, colour: _Rgb) -> None:
    x, y = rng.uniform(0, SIDE * _SCALE, 2)
    corners = int(rng.choice([3, 4, 5, 24]))
    angles = np.sort(rng.uniform(0, 2 * math.pi, corners)) if corners < 6 else _circle(corners)
    stretch, turn = rng.uniform(0.3, 1), rng.uniform(0, math.pi)
    across, down = radius * np.cos(angles), radius * stretch * np.sin(angles)
    points = np.stack(
        [
            x + across * math.cos(turn) - down * math.sin(turn),
            y + across * math.sin(turn) + down * math.cos(turn),
        ],
        axis=1,
    )
    pen.polygon(points.ravel().tolist(), fill=colour)


def _circle(corners: int) -> NDArray[np.float64]:
    return np.linspace(0, 2 * math.pi, corners, endpoint=False)


_Rgb = tuple[int, int, int]


def _rgb(colour: NDArray[np.float64]) -> _Rgb:
    red, green, blue = (int(value) for value in colour.clip(0, 255))
    return red, green, blue


def _field(rng: Generator, power: float, channels: int) -> NDArray[np.float64]:
    """Gaussian field of mean 0 and variance 1, (64, 64, channels): amplitude ∝ frequency^-power."""
    row, column = np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None]
    frequency = np.hypot(row, column)
    frequency[0, 0] = 1
    white = rng.standard_normal((channels, SIDE, SIDE))
    field = np.fft.irfft2(np.fft.rfft2(white) * frequency**-power, (SIDE, SIDE))
    field -= field.mean((1, 2), keepdims=True)
    field /= field.std((1, 2), keepdims=True)
    return field.transpose(1, 2, 0)
