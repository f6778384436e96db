"""Pictures that clients send: JPEG, PNG or WebP, refused by their header where too large."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray
from PIL.Image import Image

from aoft_deploy.data.images import read_image, read_size
from aoft_deploy.errors import ImageError
from aoft_deploy.serving.protocol.refusals import Refusal

__all__ = ["sample"]


def sample(
    data: bytes, prepare: Callable[[Image], NDArray[Any]], size: int, max_pixels: int
) -> NDArray[Any]:
    """One sample of a model's input, from a picture.

    A JPEG eight times as large as the sample is decoded at a half of its size or less, but four
    times as large at least: its sample differs by a level or two of 255 and comes five times as
    fast. All others are exactly what ``Classifier`` sees.

    Args:
        data: The file's content.
        prepare: From an upright RGB image to the sample.
        size: Side of the sample in pixels.
        max_pixels: Most pixels that are decoded.

    Raises:
        Refusal: 415 for another format, 413 for too many pixels, 400 for a damaged picture.
    """
    if not _allowed(data):
        raise Refusal(415 if data else 400, "The picture is no JPEG, PNG or WebP.")
    try:
        width, height = read_size(data, max_pixels=2**64)
        if width * height > max_pixels:
            raise Refusal(
                413,
                f"The picture has {width} x {height} pixels, above {max_pixels}: shrink it first.",
            )
        return prepare(read_image(data, max_pixels=max_pixels, least=4 * size))
    except ImageError as error:
        raise Refusal(400, str(error)) from error


def _allowed(data: bytes) -> bool:
    webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    return webp or data.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"))
