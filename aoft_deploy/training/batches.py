"""The images of each step, and loading them as tensors of pixels."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.data.splits import ImageList, Splits
from aoft_deploy.errors import ImageError, SettingError
from aoft_deploy.processors import processors
from aoft_deploy.training.augmentation import (
    AUGMENTATION,
    ORDER,
    generator,
    image_transform,
    mirrored,
    reseed,
)

__all__ = [
    "FeatureBatches",
    "Loader",
    "Part",
    "PixelBatches",
    "evaluation_parts",
    "fingerprint",
    "fingerprints",
    "training_parts",
]

MEMORY = 1 << 30
"""Largest number of bytes of pixels that a data set caches in memory."""


@dataclass(frozen=True)
class Part:
    """The images of an optimiser step that one process computes in one batch.

    Attributes:
        epoch: The epoch, from 0.
        step: The step within the epoch, from 0.
        number: Index of the part within the step, over all processes.
        images: Indices of the images, at least one.
        weight: Weight of each image in the mean loss of the step; 0 if this part has no images of
            its own.
    """

    epoch: int
    step: int
    number: int
    images: tuple[int, ...]
    weight: float


def training_parts(
    count: int, batch_size: int, parts: int, mine: range, seed: int, epoch: int
) -> Iterator[Part]:
    """Divide a shuffled epoch into equal steps, and each step into parts.

    Args:
        count: Number of images.
        batch_size: Largest number of images of a step.
        parts: Number of parts of a step, over all processes.
        mine: Indices of the parts of this process.
        seed: Seed of the order.
        epoch: The epoch, from 0.

    Yields:
        The parts of this process, ``len(mine)`` for each step.
    """
    order = generator(seed, ORDER, epoch).permutation(count)
    for step, images in enumerate(np.array_split(order, math.ceil(count / batch_size))):
        pieces = np.array_split(images, parts)
        for number in mine:
            chosen = tuple(pieces[number].tolist())
            weight = 1 / len(images) if chosen else 0.0
            yield Part(epoch, step, number, chosen or (int(images[0]),), weight)


def evaluation_parts(count: int, size: int, process: int, processes: int) -> Iterator[Part]:
    """Divide a list in its order into parts of ``size``; each image goes to exactly one process."""
    own = range(process, count, processes)
    for number in range(0, len(own), size):
        yield Part(0, 0, number, tuple(own[number : number + size]), 1.0)


class PixelBatches(Dataset[tuple[Tensor, Tensor]]):
    """Data set of parts: pixels (batch, 3, height, width) in uint8, and labels.

    Pixels that are the same in every epoch are computed once and cached if they fit into
    ``MEMORY``.

    Args:
        images: The images.
        preprocessing: How an image becomes pixels.
        augment: One of ``AUGMENTATIONS``.
        seed: Seed of the augmentation.
        tick: Called after each image that is cached.
    """

    def __init__(
        self,
        images: ImageList,
        preprocessing: Preprocessing,
        augment: str = "none",
        seed: int = 0,
        tick: Callable[[], object] = lambda: None,
    ) -> None:
        self.images, self.preprocessing = images, preprocessing
        self.augment, self.seed = augment, seed
        self.labels = torch.tensor(images.labels, dtype=torch.long)
        self.transform = None
        if augment not in ("none", "flip"):
            self.transform = image_transform(augment, preprocessing)
        needed = 3 * preprocessing.height * preprocessing.width * len(images)
        self.cached: NDArray[np.uint8] | None = None
        if self.transform is None and needed <= MEMORY:
            self.cached = self._all_pixels(tick)

    def _all_pixels(self, tick: Callable[[], object]) -> NDArray[np.uint8]:
        height, width = self.preprocessing.height, self.preprocessing.width
        pixels = np.empty((len(self.images), 3, height, width), dtype=np.uint8)

        def fill(index: int) -> None:
            pixels[index] = self._pixels(index)

        with ThreadPoolExecutor(processors()) as pool:
            for _ in pool.map(fill, range(len(self.images))):
                tick()
        return pixels

    def _pixels(self, index: int) -> NDArray[np.uint8]:
        return self.preprocessing.pixels(self.images[index][0]).transpose(2, 0, 1)

    def _image(self, epoch: int, index: int) -> NDArray[np.uint8]:
        key = (self.seed, AUGMENTATION, epoch, index)
        if self.transform is not None:
            reseed(*key)
            return self.transform(self.images[index][0])
        pixels = self._pixels(index) if self.cached is None else self.cached[index]
        return mirrored(pixels, *key) if self.augment == "flip" else pixels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, part: Part) -> tuple[Tensor, Tensor]:
        """Pixels and labels of a part."""
        if self.cached is not None and self.augment == "none":
            pixels = self.cached[list(part.images)]
        else:
            pixels = np.stack([self._image(part.epoch, index) for index in part.images])
        return torch.from_numpy(pixels), self.labels[list(part.images)]


class FeatureBatches(Dataset[tuple[Tensor, Tensor]]):
    """Data set of parts: inputs of the classifier (batch, width), and labels.

    Args:
        features: (images, width), on the device that trains.
        labels: (images,).
    """

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        self.cached, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, part: Part) -> tuple[Tensor, Tensor]:
        """Features and labels of a part."""
        images = list(part.images)
        return self.cached[images], self.labels[images]


class Loader:
    """Loads the parts of a data set in worker processes that live as long as the loader.

    Args:
        batches: The data set.
        parts: Gives the parts of an epoch.
        workers: Processes that prepare images; 0 prepares them in this process. Cached images
            need no workers.
        pin: Use page-locked memory, for a GPU.
    """

    def __init__(
        self,
        batches: PixelBatches | FeatureBatches,
        parts: Callable[[int], Iterator[Part]],
        *,
        workers: int = 0,
        pin: bool = False,
    ) -> None:
        self.batches, self.parts = batches, parts
        self.current: Sequence[Part] = ()
        workers = workers if batches.cached is None else 0
        self.loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
            batches,
            batch_size=None,  # a part is already a batch
            sampler=_CurrentParts(self),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pin and isinstance(batches, PixelBatches),
            generator=torch.Generator(),
        )

    def epoch(self, number: int) -> Iterator[tuple[Part, Tensor, Tensor]]:
        """The parts of an epoch with their pixels and labels.

        Raises:
            ImageError: An image cannot be read.
            SettingError: The system killed a worker process.
        """
        self.current = tuple(self.parts(number))
        try:
            for part, (pixels, labels) in zip(self.current, self.loader, strict=True):
                yield part, pixels, labels
        except ImageError as error:  # the message of a worker's error contains its traceback
            raise ImageError(str(error).rpartition("ImageError: ")[2].strip()) from error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise SettingError(
                "A process that loads images was killed, as happens if a container has little "
                "shared memory: use fewer `workers`, such as `workers=0`, or start the container "
                "with a larger shm-size."
            ) from error


class _CurrentParts:
    """Sampler of the parts of a loader's current epoch."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Part]:
        return iter(self.loader.current)

    def __len__(self) -> int:
        return len(self.loader.current)


def fingerprint(images: ImageList) -> str:
    """Hash of a list of images: its labels, and its pixels or its file names and sizes."""
    digest = hashlib.sha256(np.asarray(images.labels, dtype=np.int64).tobytes())
    for image in images.images:
        if isinstance(image, Path):
            size = image.stat().st_size if image.exists() else -1
            name = os.fsencode(f"{image.parent.name}/{image.name}")  # may not be UTF-8
            digest.update(name + f" {size}\n".encode())
        else:
            digest.update(f"{image.shape}\n".encode() + np.ascontiguousarray(image).tobytes())
    return digest.hexdigest()


def fingerprints(splits: Splits) -> dict[str, str | None]:
    """Short hash of each part of a data set, as ``PART_images``; None for a missing test part."""
    parts = splits.parts()
    return {
        f"{part}_images": fingerprint(parts[part])[:16] if part in parts else None
        for part in ("train", "val", "test")
    }
