"""What a sample of images shows about images that were not seen."""

from __future__ import annotations

import math

__all__ = ["CONFIDENCE", "images_needed", "share_shown"]

CONFIDENCE = 0.95
"""Confidence of the claims."""


def share_shown(agreeing: int, images: int) -> float:
    """Share that a sample shows: the exact lower bound of Clopper and Pearson (1934), one-sided.

    If the true share were lower, ``agreeing`` or more of ``images`` would have a probability below
    1 − ``CONFIDENCE``.

    Args:
        agreeing: Number of images that agree.
        images: Number of images.
    """
    low, high = 0.0, agreeing / images
    for _ in range(40 if agreeing else 0):
        share = (low + high) / 2
        logs = [
            math.lgamma(images + 1)
            - math.lgamma(k + 1)
            - math.lgamma(images - k + 1)
            + k * math.log(share)
            + (images - k) * math.log1p(-share)
            for k in range(agreeing, images + 1)
        ]
        is_likely = math.fsum(map(math.exp, logs)) > 1 - CONFIDENCE
        low, high = (low, share) if is_likely else (share, high)
    return low


def images_needed(share: float) -> int:
    """Number of images that show a share below 1 if all agree."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log(share))
