"""Which images come together in which step, and how they become tensors of pixels."""

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
from aoft_deploy.data.splits import ImageList
from aoft_deploy.errors import ImageError
from aoft_deploy.processors import processors
from aoft_deploy.training.augmentation import generator, image_transform, mirrored, reseed

__all__ = ["Loader", "Part", "PixelBatches", "evaluation_parts", "fingerprint", "training_parts"]

MEMORY = 1 << 30
"""Bytes of pixels that a split may keep in memory."""

ORDER, CHANGE = 1, 2  # purposes of random numbers


@dataclass(frozen=True)
class Part:
    """Images of one optimiser step that one process computes at once.

    Attributes:
        epoch: The epoch, from 0.
        step: The step within the epoch, from 0.
        number: The part within the step, over all processes.
        images: Their places in the list, at least one.
        weight: What each counts in the step's mean loss; 0 for a process with nothing to do.
    """

    epoch: int
    step: int
    number: int
    images: tuple[int, ...]
    weight: float


def training_parts(
    count: int, batch_size: int, parts: int, mine: range, seed: int, epoch: int
) -> Iterator[Part]:
    """Cut a shuffled epoch into equal steps, and each step into parts.

    Args:
        count: Number of images.
        batch_size: Most images of a step.
        parts: Parts of a step, over all processes.
        mine: Those of this process.
        seed: Seed of the order.
        epoch: The epoch, from 0.

    Yields:
        This process's parts of every step, ``len(mine)`` each.
    """
    order = generator(seed, ORDER, epoch).permutation(count)
    for step, images in enumerate(np.array_split(order, math.ceil(count / batch_size))):
        pieces = np.array_split(images, parts)
        for number in mine:
            chosen = tuple(pieces[number].tolist())
            weight = 1 / len(images) if chosen else 0.0
            yield Part(epoch, step, number, chosen or (int(images[0]),), weight)


def evaluation_parts(count: int, size: int, process: int, processes: int) -> Iterator[Part]:
    """Cut a list in its order into parts of ``size``, every image for exactly one process."""
    own = range(process, count, processes)
    for number in range(0, len(own), size):
        yield Part(0, 0, number, tuple(own[number : number + size]), 1.0)


class PixelBatches(Dataset[tuple[Tensor, Tensor]]):
    """Parts as pixels: (batch, 3, size, size) in uint8, and labels.

    What is the same in every epoch is done once and kept, where it fits into ``MEMORY``.

    Args:
        images: The images.
        preprocessing: How an image becomes pixels.
        augment: One of ``AUGMENTATIONS``.
        seed: Seed of the augmentation.
    """

    def __init__(
        self, images: ImageList, preprocessing: Preprocessing, augment: str = "none", seed: int = 0
    ) -> None:
        self.images, self.preprocessing = images, preprocessing
        self.augment, self.seed = augment, seed
        self.labels = torch.tensor(images.labels, dtype=torch.long)
        self.transform = None
        if augment not in ("none", "flip"):
            self.transform = image_transform(augment, preprocessing)
        needed = 3 * preprocessing.size**2 * len(images)
        self.kept: NDArray[np.uint8] | None = None
        if self.transform is None and needed <= MEMORY:
            self.kept = self._all_pixels()

    def _all_pixels(self) -> NDArray[np.uint8]:
        size = self.preprocessing.size
        pixels = np.empty((len(self.images), 3, size, size), dtype=np.uint8)

        def fill(index: int) -> None:
            pixels[index] = self._pixels(index)

        with ThreadPoolExecutor(processors()) as pool:
            list(pool.map(fill, range(len(self.images))))
        return pixels

    def _pixels(self, index: int) -> NDArray[np.uint8]:
        return self.preprocessing.pixels(self.images[index][0]).transpose(2, 0, 1)

    def _image(self, epoch: int, index: int) -> NDArray[np.uint8]:
        key = (self.seed, CHANGE, epoch, index)
        if self.transform is not None:
            reseed(*key)
            return self.transform(self.images[index][0])
        pixels = self._pixels(index) if self.kept is None else self.kept[index]
        return mirrored(pixels, *key) if self.augment == "flip" else pixels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, part: Part) -> tuple[Tensor, Tensor]:
        """Pixels and labels of a part."""
        if self.kept is not None and self.augment == "none":
            pixels = self.kept[list(part.images)]
        else:
            pixels = np.stack([self._image(part.epoch, index) for index in part.images])
        return torch.from_numpy(pixels), self.labels[list(part.images)]


class Loader:
    """Runs through a data set's parts in workers that stay alive between epochs.

    Args:
        batches: The data set.
        parts: The parts of an epoch.
        workers: Processes that prepare images; 0 prepares them in this one. Images that are
            ready in memory need none.
        pin: Put batches into page-locked memory, for a GPU.
    """

    def __init__(
        self,
        batches: PixelBatches,
        parts: Callable[[int], Iterator[Part]],
        *,
        workers: int = 0,
        pin: bool = False,
    ) -> None:
        self.parts = parts
        self.current: Sequence[Part] = ()
        workers = workers if batches.kept is None else 0
        self.loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
            batches,
            batch_size=None,  # a part is a batch already
            sampler=_Current(self),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pin,
            generator=torch.Generator(),
        )

    def epoch(self, number: int) -> Iterator[tuple[Part, Tensor, Tensor]]:
        """The parts of an epoch with their pixels and labels.

        Raises:
            ImageError: An image cannot be read.
        """
        self.current = tuple(self.parts(number))
        try:
            for part, (pixels, labels) in zip(self.current, self.loader, strict=True):
                yield part, pixels, labels
        except ImageError as error:  # a worker's arrives with its traceback in the message
            raise ImageError(str(error).rpartition("ImageError: ")[2].strip()) from error


class _Current:
    """The parts that a loader is running through, as a sampler."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Part]:
        return iter(self.loader.current)

    def __len__(self) -> int:
        return len(self.loader.current)


def fingerprint(images: ImageList) -> str:
    """Hash that tells lists of images apart: labels, and pixels or file names and sizes."""
    digest = hashlib.sha256(np.asarray(images.labels, dtype=np.int64).tobytes())
    for image in images.images:
        if isinstance(image, Path):
            size = image.stat().st_size if image.exists() else -1
            name = os.fsencode(f"{image.parent.name}/{image.name}")  # need not be UTF-8
            digest.update(name + f" {size}\n".encode())
        else:
            digest.update(f"{image.shape}\n".encode() + np.ascontiguousarray(image).tobytes())
    return digest.hexdigest()
