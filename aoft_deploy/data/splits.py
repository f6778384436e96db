"""A labelled data set in its parts, and the check that its images can be read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aoft_deploy.data.images import read_image, read_size
from aoft_deploy.errors import DataError, ImageError
from aoft_deploy.processors import processors

__all__ = ["ImageList", "Splits", "find_faults", "refuse_faults"]


_NAMED = 10  # classes that a summary names


_AT_ONCE = 1024  # files that wait for a thread


@dataclass(frozen=True)
class ImageList:
    """Images with their labels, usable as a torch data set.

    Attributes:
        images: Paths, read when asked for, or uint8 arrays of shape ``(height, width, 3)``.
        labels: The index of each image's class.
    """

    images: Sequence[Path | NDArray[np.uint8]]
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Image of mode ``RGB`` and label; an unreadable file is an ``ImageError``."""
        image = self.images[index]
        rgb = read_image(image) if isinstance(image, Path) else Image.fromarray(image)
        return rgb, self.labels[index]


@dataclass(frozen=True)
class Splits:
    """A data set for training: what to fit, what to choose by, and what to report.

    Attributes:
        train: Images to fit.
        val: Images to choose settings and epochs by.
        test: Images to report on once, or None.
        classes: Class names in the order of the labels; those of folders are sorted.
        origins: Where each part comes from, a phrase; empty where that is plain.
        passed_over: What lies beside the images and is not used, a sentence each.
    """

    train: ImageList
    val: ImageList
    test: ImageList | None
    classes: tuple[str, ...]
    origins: Mapping[str, str] = field(default_factory=dict)
    passed_over: tuple[str, ...] = ()

    def summary(self) -> list[str]:
        """Lines that say which classes there are, and how many images each part has from where."""
        more = ", …" if len(self.classes) > _NAMED else ""
        phrases = []
        for part in ("train", "val", "test"):
            images: ImageList | None = getattr(self, part)
            count = "none" if images is None else f"{len(images):,}"
            origin = f" ({self.origins[part]})" if part in self.origins else ""
            phrases.append(f"{part} {count}{origin}")
        return [
            f"{len(self.classes):,} classes: {', '.join(self.classes[:_NAMED])}{more}",
            f"images: {', '.join(phrases)}",
        ]


def find_faults(
    paths: Sequence[Path], *, whole: bool, tick: Callable[[], object] = lambda: None
) -> list[str]:
    """Sentences about the files that cannot be used, in the order of the files.

    Args:
        paths: The files, which are read in threads.
        whole: Decode the pixels too; else the headers alone are read.
        tick: Called after each file.
    """

    def fault(path: Path) -> str | None:
        try:
            (read_image if whole else read_size)(path)
        except ImageError as error:
            return str(error)
        return None

    faults = []
    with ThreadPoolExecutor(max_workers=min(8, processors())) as pool:
        for start in range(0, len(paths), _AT_ONCE):
            for found in pool.map(fault, paths[start : start + _AT_ONCE]):
                tick()
                if found:
                    faults.append(found)
    return faults


def refuse_faults(faults: Sequence[str], total: int) -> None:
    """Refuse images that cannot be used.

    Raises:
        DataError: There are some; the first five are named.
    """
    if faults:
        first = "; ".join(fault.rstrip(".") for fault in faults[:5])
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise DataError(f"{len(faults)} of {total} images cannot be used: {first}{more}.")
