"""Folders of small images, and helpers to compare image lists."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aoft_deploy.data.splits import ImageList, find_faults


def fill(folder: Path, count: int, first: int = 0) -> None:
    """Write ``count`` small images of different colours into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    place = zlib.crc32("/".join(folder.parts[-2:]).encode())
    for number in range(first, first + count):
        colour = (number, place & 255, place >> 8 & 255)
        Image.new("RGB", (3, 2), colour).save(folder / f"{number:03}.png")


def fill_classes(root: Path, part: str, count: int = 4) -> None:
    """Fill three class folders of a part."""
    for name in ("ant", "bee", "cow"):
        fill(root / part / name, count)


def names(images: ImageList | None) -> list[str]:
    """``<class folder>/<file>`` of each image."""
    assert images is not None
    return ["/".join(Path(str(path)).parts[-2:]) for path in images.images]


def pixels(images: ImageList | None) -> list[NDArray[np.uint8]]:
    """Each image as an array of shape (height, width, 3)."""
    assert images is not None
    return [np.asarray(images[i][0]) for i in range(len(images))]


def faulty(split: ImageList, *, whole: bool = False) -> list[str]:
    """Names of the files that cannot be used."""
    return [path.name for path, _ in find_faults(split.files(), whole=whole)]
