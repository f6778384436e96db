"""Images from clients: JPEG, PNG or WebP, refused by their header if they are too large."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray
from PIL.Image import Image

from aoft_deploy.data.images import read_image, read_size
from aoft_deploy.errors import ImageError
from aoft_deploy.serving.protocol.refusals import Refusal

__all__ = ["decode_sample"]


def decode_sample(
    data: bytes, prepare: Callable[[Image], NDArray[Any]], size: int, max_pixels: int
) -> NDArray[Any]:
    """Decode an image into one sample of a model's input.

    A JPEG of at least eight times the sample's size is decoded at half its size or less, but at
    least four times the sample's size: decoding is five times as fast, and the sample differs by a
    level or two of 255. Samples of all other images are exactly those of ``Classifier``.

    Args:
        data: Content of the file.
        prepare: Converts an upright RGB image to the sample.
        size: Side of the sample in pixels.
        max_pixels: Maximum number of pixels.

    Raises:
        Refusal: 415 for another format, 413 for too many pixels, 400 for a damaged image.
    """
    if not _allowed(data):
        raise Refusal(415 if data else 400, "The image is not a JPEG, PNG or WebP.")
    try:
        width, height = read_size(data, max_pixels=2**64)
        if width * height > max_pixels:
            raise Refusal(
                413,
                f"The image has {width} x {height} pixels, above {max_pixels}: shrink it first.",
            )
        return prepare(read_image(data, max_pixels=max_pixels, least=4 * size))
    except ImageError as error:
        raise Refusal(400, str(error)) from error


def _allowed(data: bytes) -> bool:
    webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    return webp or data.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"))
