"""Images as callers have them: paths, PIL images or arrays, one or many."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aoft_deploy.data.images import read_image, to_rgb, upright
from aoft_deploy.errors import ImageError

__all__ = ["ImageInput", "answer_each", "rgb_image"]

BATCH = 16
"""Maximum number of images that are in memory at once."""

ImageInput = str | Path | Image.Image | NDArray[np.uint8]
"""A path, a PIL image of any mode, or an array of shape (height, width, 3)."""

Row = TypeVar("Row")


def rgb_image(image: ImageInput) -> Image.Image:
    """An upright RGB image.

    Raises:
        ImageError: The file cannot be read, or it is no image.
    """
    if isinstance(image, str | Path):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        try:
            return upright(to_rgb(image, None), image)
        except (OSError, ValueError) as error:
            raise ImageError(f"The image cannot be used: {error}.") from error
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,):
        return Image.fromarray(image)
    shape = f" of {image.dtype} {tuple(image.shape)}" if hasattr(image, "shape") else ""
    raise ImageError(
        f"{type(image).__name__}{shape} is no image: give a path, a PIL image or a uint8 array of "
        "shape (height, width, 3)."
    )


def answer_each(
    images: ImageInput | Iterable[ImageInput],
    answer: Callable[[list[Image.Image]], list[Row]],
) -> Row | list[Row]:
    """Answer one image, or many in batches.

    Args:
        images: One image, or many, such as a list or an array of shape (batch, height, width, 3).
        answer: Called with upright RGB images; returns an answer for each.

    Returns:
        The answer for one image, or a list of answers.

    Raises:
        ImageError: A file cannot be read, or something is no image.
    """
    single = isinstance(images, str | bytes) or not isinstance(images, Iterable)
    if single or getattr(images, "ndim", 4) < 4:
        return answer([rgb_image(cast(ImageInput, images))])[0]
    given, rows = iter(cast(Iterable[ImageInput], images)), list[Row]()
    while batch := [*map(rgb_image, islice(given, BATCH))]:
        rows += answer(batch)
    return rows
