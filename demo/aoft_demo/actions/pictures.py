"""Reading of uploaded pictures with limited memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from aoft_deploy.data.images import read_image, read_size

__all__ = ["MAX_PIXELS", "MAX_STORED", "Picture", "read_picture"]

MAX_PIXELS = 20_000_000
"""Pixels that are decoded at most."""

MAX_STORED = 64_000_000
"""Pixels that a JPEG may have; above ``MAX_PIXELS`` it is decoded at 1/2, 1/4 or 1/8 per side."""


@dataclass(frozen=True)
class Picture:
    """A decoded picture.

    Attributes:
        image: Upright RGB; smaller than the picture in the file if that exceeds ``MAX_PIXELS``.
        width: Width of the upright picture in the file.
        height: Height of the upright picture in the file.
    """

    image: Image.Image
    width: int
    height: int


def read_picture(path: Path, size: int) -> Picture:
    """Read a picture for a model; a large photograph is decoded at a fraction of its size.

    Args:
        path: The file.
        size: Side of the model's input in pixels.

    Raises:
        ImageError: The picture is damaged or has too many pixels.
    """
    sides = read_size(path, max_pixels=MAX_STORED)
    least = None
    if sides[0] * sides[1] > MAX_PIXELS:
        least = min(4 * size, min(sides) // 2)
    image = read_image(path, max_pixels=MAX_PIXELS, least=least)
    long, short = max(sides), min(sides)
    width, height = (long, short) if image.width >= image.height else (short, long)
    return Picture(image, width, height)
