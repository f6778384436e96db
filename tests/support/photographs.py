"""Photographs as phones save them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from aoft_demo.tasks.shared_fleet import BUNDLED

__all__ = ["PHOTOGRAPHS", "photograph"]


PHOTOGRAPHS = {"24 MP": (6000, 4000), "50 MP": (8160, 6120), "panorama": (20_000, 2500)}
"""Sizes of photographs; the largest sensors of phones have 50 megapixels."""


def photograph(path: Path, size: tuple[int, int], **options: object) -> Path:
    """Write a JPEG of a cat in a given width and height."""
    picture = Image.open(BUNDLED / "cat.jpg").convert("RGB")
    picture.resize(size).save(path, "JPEG", quality=90, **options)
    return path
