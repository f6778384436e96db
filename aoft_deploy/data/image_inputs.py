"""Images as callers have them: paths, PIL images or arrays, one or many."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aoft_deploy.data.images import read_image, to_rgb, upright
from aoft_deploy.errors import ImageError

if TYPE_CHECKING:
    from aoft_deploy.classes import Answer, Classes

__all__ = ["ImageInput", "Predictor", "answer_each", "rgb_image"]

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


class Predictor:
    """Base of what classifies images: a model in memory, or an artefact."""

    classes: Classes

    def image_logits(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Logits, (batch, classes), of upright RGB images."""
        raise NotImplementedError

    @overload
    def predict(  # type: ignore[overload-overlap]  # a text is one path, not many
        self, images: ImageInput, top: int | None = None
    ) -> list[Answer]: ...
    @overload
    def predict(
        self, images: Iterable[ImageInput], top: int | None = None
    ) -> list[list[Answer]]: ...
    def predict(
        self, images: ImageInput | Iterable[ImageInput], top: int | None = None
    ) -> list[Answer] | list[list[Answer]]:
        """Classify images.

        Args:
            images: A path, a PIL image or an array of uint8 (height, width, 3), or many of them.
            top: Number of most probable classes. None gives the best one; of independent labels
                (sigmoid), all above 0.5. Plain values are always all given.

        Returns:
            For each image predictions, best first, or values; without the outer list for one image.

        Raises:
            ImageError: A file cannot be read, or something is no image.
            ArtefactError: An artefact has another number of logits than of classes.
            VerificationError: A logit is not finite.
        """
        return answer_each(images, lambda few: self.classes.answers(self.image_logits(few), top))
