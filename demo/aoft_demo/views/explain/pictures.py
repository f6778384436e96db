"""Pictures as data addresses: photographs, and weights as coloured squares."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["jpeg_address", "weights_address"]

POSITIVE, NEGATIVE = (20, 150, 138), (226, 106, 36)
"""Colours of weights above and below zero; both are readable on a light and a dark page."""

CELL = 6
"""Side of a weight's square in pixels."""


def jpeg_address(picture: Image.Image) -> str:
    """The address of a picture, for the attribute ``src``."""
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def weights_address(weights: NDArray[np.float32], most: float) -> str:
    """The address of weights as squares: the larger, the stronger the colour; zero has none.

    Args:
        weights: float32 (rows, columns).
        most: Absolute value of the strongest colour.
    """
    strength = np.clip(np.abs(weights) / (most or 1.0), 0, 1)
    pixels = np.zeros((*weights.shape, 4), np.uint8)
    pixels[..., :3] = np.where((weights >= 0)[..., None], POSITIVE, NEGATIVE)
    pixels[..., 3] = np.rint(255 * strength)
    content = io.BytesIO()
    Image.fromarray(pixels.repeat(CELL, 0).repeat(CELL, 1)).save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
