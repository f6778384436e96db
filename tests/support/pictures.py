"""Pictures of random colours."""

from __future__ import annotations

import numpy as np
from PIL import Image

__all__ = ["random_picture"]


def random_picture(width: int, height: int, seed: int) -> Image.Image:
    """Coarse random colours with fine noise, so that a shift or a rotation changes the answer."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (3, 3, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height)), np.float64)
    noisy = smooth + generator.normal(0, 12, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
