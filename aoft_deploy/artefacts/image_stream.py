"""Classify any number of image files in bounded memory: read ahead in threads, answer in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from PIL.Image import Image

from aoft_deploy.artefacts.prediction import Classifier
from aoft_deploy.classes import Answer
from aoft_deploy.data.images import read_image
from aoft_deploy.errors import AoftError, ImageError, VerificationError
from aoft_deploy.processors import processors

__all__ = ["Source", "classify_stream"]

BATCH, PIXELS = 16, 32_000_000
"""Largest number of images of a batch, and of their pixels unless it is a single image."""

READERS = min(4, processors())
"""Number of images that are read at the same time."""

Source = tuple[str, Path | bytes]
"""An image's name, and its file or the file's content."""


def classify_stream(
    classifier: Classifier, sources: Iterable[Source], top: int | None = None
) -> Iterator[tuple[str, list[Answer] | AoftError]]:
    """Classify images as they are read.

    Args:
        classifier: Answers for batches of up to 16 images.
        sources: The images; a few are taken ahead.
        top: Number of answers for each image; see ``Classes.answers``.

    Yields:
        The name of each image, in order, with its answers or with the reason why there are none.
    """
    batch: list[tuple[str, Image | ImageError]] = []
    pixels = 0
    for name, image in _read_ahead(sources):
        size = 0 if isinstance(image, ImageError) else image.width * image.height
        if batch and (len(batch) == BATCH or pixels + size > PIXELS):
            yield from _answered(classifier, batch, top)
            batch, pixels = [], 0
        batch.append((name, image))
        pixels += size
    yield from _answered(classifier, batch, top)


def _read_ahead(sources: Iterable[Source]) -> Iterator[tuple[str, Image | ImageError]]:
    ahead: deque[tuple[str, Future[Image | ImageError]]] = deque()
    with ThreadPoolExecutor(READERS) as pool:
        for name, source in sources:
            ahead.append((name, pool.submit(_read, source)))
            if len(ahead) > READERS:
                first, future = ahead.popleft()
                yield first, future.result()
        for name, future in ahead:
            yield name, future.result()


def _read(source: Path | bytes) -> Image | ImageError:
    try:
        return read_image(source)
    except ImageError as error:
        return error


def _answered(
    classifier: Classifier, batch: list[tuple[str, Image | ImageError]], top: int | None
) -> Iterator[tuple[str, list[Answer] | AoftError]]:
    """The answers of a batch; if it fails, its images are classified one by one."""
    images = [image for _, image in batch if not isinstance(image, ImageError)]
    try:
        answers = iter(classifier.predict(images, top) if images else [])
    except VerificationError as error:
        if len(batch) == 1:
            yield batch[0][0], VerificationError(f"{batch[0][0]} has no answer. {error}")
        else:
            for each in batch:
                yield from _answered(classifier, [each], top)
        return
    for name, image in batch:
        yield name, image if isinstance(image, ImageError) else next(answers)
