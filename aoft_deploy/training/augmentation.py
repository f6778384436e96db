"""Random changes of training images, each decided by a key and never by what happened before.

A key is a tuple of whole numbers such as (seed, purpose, epoch, image). Equal keys give equal
numbers in any process, so runs repeat exactly for any number of workers.
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

__all__ = ["generator", "image_transform", "mirrored", "mix", "preserved_randomness", "reseed"]

CROP_SCALE = (0.5, 1.0)
"""Share of an image's area that a random crop keeps."""

DEGREES, SHIFT, SCALE = 10.0, (0.08, 0.08), (0.9, 1.1)
"""Largest turn either way, largest shift as a share of the side, and range of the scale."""

BILINEAR = InterpolationMode.BILINEAR

RAND_AUGMENT = "rand-m9-inc1"
"""timm's notation: two operations of strength 9. At 10, its posterize keeps no bit, which Pillow
refuses, so the strength is not varied at random."""


def generator(*key: int) -> np.random.Generator:
    """The random numbers of a key."""
    return np.random.default_rng(key)


def reseed(*key: int) -> None:
    """Set the global generators that timm, torchvision and dropout draw from."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def preserved_randomness(device: torch.device) -> Iterator[None]:
    """Leave the caller's global generators as they were.

    Args:
        device: The device whose generator the block may reseed, besides the CPU's.
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
    """Random changes of a whole image, before it becomes pixels.

    ``affine`` turns, shifts and scales a little and never mirrors, for classes such as digits;
    ``window`` resizes as the evaluation does, and cuts at random where that cuts from the centre;
    ``crop`` is a random resized crop; both mirror half of the images. ``rand`` adds RandAugment to
    ``crop``.

    Draws from the global generators: ``reseed`` before each call.

    Args:
        augment: ``affine``, ``window``, ``crop`` or ``rand``.
        preprocessing: Says the size, the interpolation and the colour of filled corners.

    Returns:
        A function from an RGB image to pixels of shape (3, size, size).

    Raises:
        UnknownNameError: Another ``augment``.
    """
    if augment not in AUGMENTATIONS[2:]:
        raise UnknownNameError("augmentation of whole images", augment, AUGMENTATIONS[2:])
    if augment == "affine":
        fill = [round(255 * mean) for mean in preprocessing.mean]
        turned = RandomAffine(DEGREES, SHIFT, SCALE, interpolation=BILINEAR, fill=fill)  # type: ignore[no-untyped-call]
        return partial(_affine_pixels, turned, preprocessing)
    if augment == "window":
        whole = preprocessing
        if whole.crop_pct <= 1:
            side = math.floor(whole.size / whole.crop_pct)
            whole = replace(whole, size=side, crop_pct=1.0)
        return partial(_window_pixels, whole, preprocessing.size)
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
    turned: RandomAffine, preprocessing: Preprocessing, image: Image.Image
) -> NDArray[np.uint8]:
    """The evaluation's pixels, turned, shifted and scaled."""
    changed = turned(Image.fromarray(preprocessing.pixels(image)))
    return np.asarray(changed).transpose(2, 0, 1)


def _window_pixels(whole: Preprocessing, size: int, image: Image.Image) -> NDArray[np.uint8]:
    """A square of the side ``size`` at a random place of the resized image."""
    top, left = (random.randint(0, whole.size - size) for _ in range(2))
    window = whole.pixels(image)[top : top + size, left : left + size].transpose(2, 0, 1)
    return window[..., ::-1] if random.random() < 0.5 else window


def _pixels(transform: Callable[[Image.Image], object], image: Image.Image) -> NDArray[np.uint8]:
    """The transform's pixels, which are a tensor in newer versions of timm."""
    return np.asarray(transform(image))


def mirrored(pixels: NDArray[np.uint8], *key: int) -> NDArray[np.uint8]:
    """Pixels of shape (…, width), left and right exchanged in half of all cases."""
    return pixels[..., ::-1] if generator(*key).random() < 0.5 else pixels


def mix(
    images: Tensor, mixup: float, cutmix: float, rng: np.random.Generator
) -> tuple[Tensor, float]:
    """Blend each image with its partner, which is the image at its place from the end.

    Args:
        images: (batch, 3, height, width).
        mixup: Alpha of mixup (arXiv 1710.09412), which adds the pair; 0 for none.
        cutmix: Alpha of CutMix (arXiv 1905.04899), which pastes a box; 0 for none.
        rng: Source of the share and of the box.

    Returns:
        The images, and the share of each one's own label, 0.5 to 1; the partner has the rest.
    """
    if not mixup and not cutmix:
        return images, 1.0
    pastes = bool(cutmix) and (not mixup or rng.random() < 0.5)
    alpha = cutmix if pastes else mixup
    share = float(rng.beta(alpha, alpha))
    share = max(share, 1 - share)  # both of a pair are mixed: the same images, and a clear own one
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
    """A random span of ``share`` of a length, cut off at its ends."""
    half = int(length * share) // 2
    centre = int(rng.integers(length))
    return slice(max(centre - half, 0), min(centre + half, length))
