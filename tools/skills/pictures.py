"""Pictures as arrays: crops, what can be measured on them, and how to change just that.

A picture is a float32 array of shape (64, 64, 3) with values from 0 to 255. A change clips at the
ends, so each is measured again after it.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageFilter

__all__ = [
    "SIDE",
    "Picture",
    "adjusted",
    "blurred",
    "colourfulness",
    "crop",
    "detail",
    "exposed",
    "finished",
    "grey",
    "hue_turned",
    "light",
    "noisy",
    "tinted",
    "warmth",
]

SIDE = 64
"""Width and height of a picture in pixels: the backbone's input."""

Picture = NDArray[np.float32]

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def crop(image: Image.Image, rng: Generator, least: float = 0.4) -> Picture:
    """A random part of a photograph, of at least this share of its shorter side, or mirrored."""
    short = min(image.size)
    side = short * rng.uniform(least, 1)
    across = min(side * math.exp(rng.uniform(-0.15, 0.15)), image.width)
    down = min(side * math.exp(rng.uniform(-0.15, 0.15)), image.height)
    left, top = rng.uniform(0, image.width - across), rng.uniform(0, image.height - down)
    box = (left, top, left + across, top + down)
    pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box), np.float32)
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def light(picture: Picture) -> float:
    """Mean luma, 0 to 255."""
    return float((picture @ _LUMA).mean())


def warmth(picture: Picture) -> float:
    """How much more red than blue it has: their difference over the mean of all channels."""
    red, green, blue = (float(picture[..., i].mean()) for i in range(3))
    return (red - blue) / ((red + green + blue) / 3 + 1)


def colourfulness(picture: Picture) -> float:
    """Mean difference of the largest and the smallest channel of a pixel, 0 to 255."""
    return float((picture.max(2) - picture.min(2)).mean())


def detail(picture: Picture) -> float:
    """Mean difference of the luma of neighbouring pixels, 0 to 255."""
    luma = picture @ _LUMA
    return float(np.abs(np.diff(luma, axis=0)).mean() + np.abs(np.diff(luma, axis=1)).mean()) / 2


def grey(picture: Picture) -> Picture:
    """The luma in all three channels."""
    return np.repeat((picture @ _LUMA)[..., None], 3, axis=2)


def exposed(picture: Picture, wanted: float) -> Picture:
    """As bright as ``wanted``, a mean luma, by a gain, and by a gamma where a gain would clip."""
    for _ in range(4):
        now = max(light(picture), 1.0)
        if wanted < now:
            picture = picture * (wanted / now)
        else:
            power = math.log(min(wanted, 250) / 255) / math.log(min(now, 250) / 255)
            picture = np.asarray(
                255 * (picture.clip(0, 255) / 255) ** np.float32(power), np.float32
            )
    return picture


def tinted(picture: Picture, wanted: float) -> Picture:
    """As warm as ``wanted``, by gains of red and blue."""
    for _ in range(6):
        step = np.float32(math.exp(0.6 * (wanted - warmth(picture))))
        picture = (picture * np.array([step, 1, 1 / step], np.float32)).clip(0, 255)
    return picture


def hue_turned(picture: Picture, angle: float, gain: float = 1.0) -> Picture:
    """All hues turned by an angle in radians, and colourfulness times a gain."""
    axis = np.full(3, 1 / math.sqrt(3))
    cross = np.array([(0, -axis[2], axis[1]), (axis[2], 0, -axis[0]), (-axis[1], axis[0], 0)])
    turn = math.cos(angle) * np.eye(3) + math.sin(angle) * cross
    turn += (1 - math.cos(angle)) * np.outer(axis, axis)
    mean = picture.mean(2, keepdims=True)
    turned: Picture = mean + gain * ((picture - mean) @ turn.T.astype(np.float32))
    return turned


def adjusted(picture: Picture, rng: Generator, contrast: float = 0.4) -> Picture:
    """Contrast and brightness changed a little at random."""
    gain = math.exp(rng.uniform(-contrast, contrast))
    mean = picture.mean()
    changed: Picture = (picture - mean) * gain + mean * math.exp(rng.uniform(-0.3, 0.2))
    return changed.clip(0, 255)


def blurred(picture: Picture, rng: Generator, least: float = 1.4, most: float = 3.5) -> Picture:
    """Out of focus or moved, by about ``least`` to ``most`` pixels."""
    radius = rng.uniform(least, most)
    if rng.random() < 0.3:
        angle, steps = rng.uniform(0, math.pi), np.linspace(-2.2 * radius, 2.2 * radius, 15)
        moved = [
            _shifted(picture, step * math.cos(angle), step * math.sin(angle)) for step in steps
        ]
        return np.asarray(np.mean(moved, axis=0, dtype=np.float32))
    kind = ImageFilter.GaussianBlur if rng.random() < 0.6 else ImageFilter.BoxBlur
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    scale = 1.0 if kind is ImageFilter.GaussianBlur else 1.5
    return np.asarray(image.filter(kind(radius * scale)), np.float32)


def noisy(picture: Picture, rng: Generator, least: float, most: float) -> Picture:
    """With Gaussian noise of a random standard deviation: grey, coloured or both."""
    sigma = rng.uniform(least, most)
    coloured = rng.normal(0, sigma, picture.shape)
    same = rng.normal(0, sigma, (*picture.shape[:2], 1))
    share = rng.choice([0.0, 1.0, rng.random()])
    noise = math.sqrt(share) * coloured + math.sqrt(1 - share) * same
    return np.asarray(picture + noise, np.float32)


def finished(picture: Picture) -> NDArray[np.uint8]:
    """Rounded and clipped to uint8."""
    return picture.clip(0, 255).round().astype(np.uint8)


def _shifted(picture: Picture, across: float, down: float) -> Picture:
    """Moved by whole pixels; the edge repeats."""
    x = (np.arange(SIDE) + round(across)).clip(0, SIDE - 1)
    y = (np.arange(SIDE) + round(down)).clip(0, SIDE - 1)
    return np.asarray(picture[y][:, x])
