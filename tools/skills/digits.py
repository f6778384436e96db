"""Scanned digits, 8 x 8 pixels, from scikit-learn (UCI optdigits, CC BY 4.0)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from skills.photographs import Part

__all__ = ["scanned_digits"]


def scanned_digits() -> dict[Part, list[list[NDArray[np.uint8]]]]:
    """Scans by part and digit. The parts share no scan."""
    from sklearn.datasets import load_digits

    data = load_digits()
    scans = (data.images * (255 / 16)).round().astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(scans))
    bounds: dict[Part, NDArray[np.int64]] = {
        "train": order[:1100],
        "val": order[1100:1300],
        "test": order[1300:],
    }
    return {
        part: [[scans[i] for i in indices if data.target[i] == digit] for digit in range(10)]
        for part, indices in bounds.items()
    }
