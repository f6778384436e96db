"""Normalisation of pixels: the one formula between an image and a model's input."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["normalised"]


def normalised(
    pixels: NDArray[np.uint8], mean: tuple[float, float, float], std: tuple[float, float, float]
) -> NDArray[np.float32]:
    """Pixels as a model takes them: ``(pixels / 255 - mean) / std`` in float32.

    Args:
        pixels: uint8 [batch, H, W, 3].
        mean: Of each channel, on the scale 0..1.
        std: Of each channel, on the scale 0..1.

    Returns:
        float32 [batch, 3, H, W].
    """
    scaled = pixels.astype(np.float32) / np.float32(255)
    centred = scaled - np.asarray(mean, np.float32)
    return np.ascontiguousarray((centred / np.asarray(std, np.float32)).transpose(0, 3, 1, 2))
