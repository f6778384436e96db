"""A labelled data set split into parts, and the check that its images can be read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aoft_deploy.data.images import read_image, read_size
from aoft_deploy.errors import DataError, ImageError, SettingError
from aoft_deploy.processors import processors

__all__ = ["ImageList", "Splits", "check_seed", "find_faults", "named_faults"]

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
        source: Folder or task that the images come from.
        origins: A phrase on where each part comes from; parts without need of one are absent.
        notes: Sentences, without full stops, on what is not used or may not be meant.
    """

    train: ImageList
    val: ImageList
    test: ImageList | None
    classes: tuple[str, ...]
    source: str = ""
    origins: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def parts(self) -> dict[str, ImageList]:
        """The parts that exist, by name."""
        parts = {"train": self.train, "val": self.val, "test": self.test}
        return {name: images for name, images in parts.items() if images is not None}

    def without(self, files: Collection[Path]) -> Splits:
        """The same data set without some files.

        Raises:
            DataError: A part has no images left, or a class has none left in ``train``.
        """
        gone, left = frozenset(files), {}
        for name, images in self.parts().items():
            kept = [
                (image, label)
                for image, label in zip(images.images, images.labels, strict=True)
                if not (isinstance(image, Path) and image in gone)
            ]
            left[name] = ImageList([image for image, _ in kept], [label for _, label in kept])
            used = set(left[name].labels)
            empty = [c for i, c in enumerate(self.classes) if name == "train" and i not in used]
            if empty or not kept:
                which = f" of class {empty[0]!r}" if empty else ""
                raise DataError(f"No image{which} in {name} can be used: add some.")
        return replace(self, train=left["train"], val=left["val"], test=left.get("test"))

    def summary(self) -> list[tuple[str, str]]:
        """A name and a phrase for the data set and for each part: images, classes, origin."""
        parts = self.parts()
        count = f"{sum(map(len, parts.values())):,} images of {len(self.classes):,} classes"
        more = ", …" if len(self.classes) > _LISTED_CLASSES else ""
        names = ", ".join(self.classes[:_LISTED_CLASSES])
        rows = [("data", f"{f'{self.source}: ' if self.source else ''}{count} ({names}{more})")]
        for part, images in parts.items():
            origin = f" ({self.origins[part]})" if part in self.origins else ""
            counts = Counter(images.labels)
            fewest = min(counts[label] for label in range(len(self.classes)))
            most = max(counts.values())
            share = f"{fewest:,} of each" if fewest == most else f"{fewest:,} to {most:,} of a"
            rows.append((part, f"{len(images):,} images, {share} class{origin}"))
        return rows


def check_seed(seed: int) -> None:
    """Refuse a negative seed.

    Raises:
        SettingError: The seed is negative.
    """
    if seed < 0:
        raise SettingError(f"`seed` is {seed}, but must be a whole number from 0.")


def find_faults(
    paths: Sequence[Path], *, whole: bool, tick: Callable[[], object] = lambda: None
) -> list[tuple[Path, str]]:
    """Read files in threads; return each that cannot be used, with a sentence, in order.

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
            queued = paths[start : start + _QUEUED_FILES]
            for path, found in zip(queued, pool.map(fault, queued), strict=True):
                tick()
                if found:
                    faults.append((path, found))
    return faults


def named_faults(faults: Sequence[tuple[Path, str]]) -> str:
    """The first five faults that ``find_faults`` returned, as the end of a sentence."""
    first = "; ".join(fault.rstrip(".") for _, fault in faults[:5])
    return first + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
