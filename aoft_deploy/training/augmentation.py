"""Random augmentation of training images, determined by keys.

A key is a tuple of whole numbers such as (seed, purpose, epoch, image). Equal keys give equal
random numbers in any process, so runs are exactly repeatable with any number of workers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomAffine

from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import UnknownNameError
from aoft_deploy.training.settings import AUGMENTATIONS

__all__ = [
    "AUGMENTATION",
    "DEPTH",
    "MIX",
    "ORDER",
    "generator",
    "image_transform",
    "mirrored",
    "mix",
    "preserved_randomness",
    "reseed",
]

ORDER, AUGMENTATION, DEPTH, MIX = 1, 2, 3, 4
"""Purposes of random numbers, as part of a key."""

CROP_SCALE = (0.5, 1.0)
"""Range of the fraction of the area that a random crop keeps."""

DEGREES, SHIFT, SCALE = 10.0, (0.08, 0.08), (0.9, 1.1)
"""Largest rotation in either direction, largest shift as a fraction of the side, range of scale."""

BILINEAR = InterpolationMode.BILINEAR

RAND_AUGMENT = "rand-m9-inc1"
"""timm's notation: two operations of magnitude 9. The magnitude is not randomised, because at 10
posterize keeps no bit, which Pillow refuses."""


def generator(*key: int) -> np.random.Generator:
    """Random generator of a key."""
    return np.random.default_rng(key)


def reseed(*key: int) -> None:
    """Seed the global generators that timm, torchvision and dropout use."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def preserved_randomness(device: torch.device) -> Iterator[None]:
    """Context manager: restore the global generators on exit.

    Args:
        device: Its generator is restored too, besides that of the CPU.
    """
    python, numpy = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def image_transform(
    augment: str, preprocessing: Preprocessing
) -> Callable[[Image.Image], NDArray[np.uint8]]:
    """Random transform from an image to pixels, for the augmentations that need the whole image.

    ``affine`` rotates, shifts and scales slightly and never mirrors, for classes such as digits;
    ``window`` resizes as in evaluation, but crops at a random position instead of the centre;
    ``crop`` is a random resized crop; both mirror half of the images. ``rand`` adds RandAugment to
    ``crop``.

    The transform uses the global generators: call ``reseed`` before each call.

    Args:
        augment: ``affine``, ``window``, ``crop`` or ``rand``.
        preprocessing: Gives the size, the interpolation and the colour of filled corners.

    Returns:
        A function from an RGB image to pixels of shape (3, height, width).

    Raises:
        UnknownNameError: ``augment`` is none of these.
    """
    if augment not in AUGMENTATIONS[2:]:
        raise UnknownNameError("augmentation of whole images", augment, AUGMENTATIONS[2:])
    if augment == "affine":
        fill = [round(255 * mean) for mean in preprocessing.mean]
        affine = RandomAffine(DEGREES, SHIFT, SCALE, interpolation=BILINEAR, fill=fill)  # type: ignore[no-untyped-call]
        return partial(_affine_pixels, affine, preprocessing)
    if augment == "window":
        uncropped = preprocessing
        if uncropped.crop_pct <= 1:
            height, width = (
                math.floor(side / uncropped.crop_pct)
                for side in (preprocessing.height, preprocessing.width)
            )
            uncropped = replace(uncropped, size=(height, width), crop_pct=1.0)
        return partial(_window_pixels, uncropped, preprocessing)
    transform = create_transform(
        preprocessing.size,
        is_training=True,
        scale=CROP_SCALE,
        color_jitter=0.0,
        auto_augment=RAND_AUGMENT if augment == "rand" else None,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        use_prefetcher=True,  # stops at uint8
    )
    return partial(_pixels, transform)


def _affine_pixels(
    affine: RandomAffine, preprocessing: Preprocessing, image: Image.Image
) -> NDArray[np.uint8]:
    """The pixels of evaluation, rotated, shifted and scaled."""
    changed = affine(Image.fromarray(preprocessing.pixels(image)))
    return np.asarray(changed).transpose(2, 0, 1)


def _window_pixels(
    uncropped: Preprocessing, cropped: Preprocessing, image: Image.Image
) -> NDArray[np.uint8]:
    """A crop at a random position of the resized image."""
    top = random.randint(0, uncropped.height - cropped.height)
    left = random.randint(0, uncropped.width - cropped.width)
    rows, columns = slice(top, top + cropped.height), slice(left, left + cropped.width)
    window = uncropped.pixels(image)[rows, columns].transpose(2, 0, 1)
    return window[..., ::-1] if random.random() < 0.5 else window


def _pixels(transform: Callable[[Image.Image], object], image: Image.Image) -> NDArray[np.uint8]:
    """Pixels of a transform as an array; newer versions of timm return a tensor."""
    return np.asarray(transform(image))


def mirrored(pixels: NDArray[np.uint8], *key: int) -> NDArray[np.uint8]:
    """Pixels of shape (…, width), mirrored left to right with probability 1/2."""
    return pixels[..., ::-1] if generator(*key).random() < 0.5 else pixels


def mix(
    images: Tensor, mixup: float, cutmix: float, rng: np.random.Generator
) -> tuple[Tensor, float]:
    """Mix each image with its partner: the image at the same position from the end of the batch.

    Args:
        images: (batch, 3, height, width).
        mixup: Alpha of mixup (arXiv 1710.09412), which blends the two images; 0 for none.
        cutmix: Alpha of CutMix (arXiv 1905.04899), which pastes a box; 0 for none.
        rng: Random generator for the share and the box.

    Returns:
        The images, and the weight of each image's own label, 0.5 to 1; its partner's label has
        the rest.
    """
    if not mixup and not cutmix:
        return images, 1.0
    pastes = bool(cutmix) and (not mixup or rng.random() < 0.5)
    alpha = cutmix if pastes else mixup
    share = float(rng.beta(alpha, alpha))
    share = max(
        share, 1 - share
    )  # a pair is mixed both ways, so the larger share can be the own one
    partners = images.flip(0)
    if not pastes:
        return torch.lerp(partners, images, share), share
    height, width = images.shape[-2:]
    rows, columns = (_span(length, math.sqrt(1 - share), rng) for length in (height, width))
    mixed = images.clone()
    mixed[..., rows, columns] = partners[..., rows, columns]
    pasted = (rows.stop - rows.start) * (columns.stop - columns.start)
    return mixed, 1 - pasted / (height * width)


def _span(length: int, share: float, rng: np.random.Generator) -> slice:
    """A random span with the fraction ``share`` of a length, clipped at both ends."""
    half = int(length * share) // 2
    centre = int(rng.integers(length))
    return slice(max(centre - half, 0), min(centre + half, length))
