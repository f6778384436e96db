"""A labelled data set split into parts, and the check that its images can be read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aoft_deploy.data.images import read_image, read_size
from aoft_deploy.errors import DataError, ImageError, SettingError
from aoft_deploy.processors import processors

__all__ = ["ImageList", "Splits", "check_seed", "find_faults", "refuse_faults"]

_LISTED_CLASSES = 10  # class names in a summary
_QUEUED_FILES = 1024  # files that are queued for the threads at a time


@dataclass(frozen=True)
class ImageList:
    """Images with their labels, usable as a torch data set.

    Attributes:
        images: Paths, read on access, or uint8 arrays of shape ``(height, width, 3)``.
        labels: Class index of each image.
    """

    images: Sequence[Path | NDArray[np.uint8]]
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Image of mode ``RGB`` and its label; an unreadable file raises ``ImageError``."""
        image = self.images[index]
        rgb = read_image(image) if isinstance(image, Path) else Image.fromarray(image)
        return rgb, self.labels[index]

    def files(self) -> list[Path]:
        """The images that are files, each once."""
        return list(dict.fromkeys(image for image in self.images if isinstance(image, Path)))


@dataclass(frozen=True)
class Splits:
    """A data set for training, split into its parts.

    Attributes:
        train: Images to fit.
        val: Images to choose settings and epochs by.
        test: Images for one final test, or None.
        classes: Class names in the order of the labels; sorted if they are folder names.
        origins: A phrase on where each part comes from; parts without need of one are absent.
        skipped: Sentences on files and folders beside the images that are not used.
    """

    train: ImageList
    val: ImageList
    test: ImageList | None
    classes: tuple[str, ...]
    origins: Mapping[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    def parts(self) -> dict[str, ImageList]:
        """The parts that exist, by name."""
        parts = {"train": self.train, "val": self.val, "test": self.test}
        return {name: images for name, images in parts.items() if images is not None}

    def summary(self) -> list[str]:
        """Two lines: the classes, and the number and origin of the images of each part."""
        more = ", …" if len(self.classes) > _LISTED_CLASSES else ""
        phrases, parts = [], self.parts()
        for part in ("train", "val", "test"):
            count = f"{len(parts[part]):,}" if part in parts else "none"
            origin = f" ({self.origins[part]})" if part in self.origins else ""
            phrases.append(f"{part} {count}{origin}")
        return [
            f"{len(self.classes):,} classes: {', '.join(self.classes[:_LISTED_CLASSES])}{more}",
            f"images: {', '.join(phrases)}",
        ]


def check_seed(seed: int) -> None:
    """Refuse a negative seed.

    Raises:
        SettingError: The seed is negative.
    """
    if seed < 0:
        raise SettingError(f"`seed` is {seed}, but must be a whole number from 0.")


def find_faults(
    paths: Sequence[Path], *, whole: bool, tick: Callable[[], object] = lambda: None
) -> list[str]:
    """Read files in threads; return a sentence for each that cannot be used, in order.

    Args:
        paths: The files.
        whole: Decode the pixels; otherwise read only the headers.
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
        for start in range(0, len(paths), _QUEUED_FILES):
            for found in pool.map(fault, paths[start : start + _QUEUED_FILES]):
                tick()
                if found:
                    faults.append(found)
    return faults


def refuse_faults(faults: Sequence[str], total: int) -> None:
    """Refuse a data set with images that cannot be used.

    Args:
        faults: From :func:`find_faults`.
        total: Number of images that were checked.

    Raises:
        DataError: There are faults; the first five are quoted.
    """
    if faults:
        first = "; ".join(fault.rstrip(".") for fault in faults[:5])
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise DataError(f"{len(faults)} of {total} images cannot be used: {first}{more}.")
