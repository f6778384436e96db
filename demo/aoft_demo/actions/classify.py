"""One picture, many tasks, one pass through the backbone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from aoft_demo.tasks.visitors import Visitor
from aoft_deploy.artefacts.prediction import Prediction, ranked
from aoft_deploy.data.images import read_image, read_size
from aoft_deploy.errors import SettingError

__all__ = ["MAX_PIXELS", "MAX_STORED", "Answers", "Picture", "classify", "read_picture"]

MAX_PIXELS = 20_000_000
"""Pixels that are decoded of a picture."""

MAX_STORED = 64_000_000
"""Pixels of a JPEG, of which a half, a quarter or an eighth of each side is decoded."""

TOP = 5


@dataclass(frozen=True)
class Picture:
    """A picture as a visitor sees it.

    Attributes:
        image: Upright RGB; smaller than the file's where that has more than ``MAX_PIXELS``.
        width: Of the file's picture, upright.
        height: Likewise.
    """

    image: Image.Image
    width: int
    height: int


def read_picture(path: Path, size: int) -> Picture:
    """Read a picture for a model; a large photograph is decoded at a fraction of its size.

    Args:
        path: The file.
        size: Side of the model's input in pixels.

    Raises:
        ImageError: The picture cannot be used, or has too many pixels.
    """
    sides = read_size(path, max_pixels=MAX_STORED)
    least = None
    if sides[0] * sides[1] > MAX_PIXELS:
        least = min(4 * size, min(sides) // 2)
    image = read_image(path, max_pixels=MAX_PIXELS, least=least)
    long, short = max(sides), min(sides)
    width, height = (long, short) if image.width >= image.height else (short, long)
    return Picture(image, width, height)


@dataclass(frozen=True)
class Answers:
    """What the tasks say about a picture.

    Attributes:
        predictions: The best classes of each task, best first.
        seconds: The one pass, for all tasks together.
        switch: Seconds in which the tasks' numbers were found and held, of ``seconds``.
        width: Of the picture.
        height: Of it.
    """

    predictions: dict[str, list[Prediction]]
    seconds: float
    switch: float
    width: int
    height: int


def classify(visitor: Visitor, picture: Path, names: Sequence[str], top: int = TOP) -> Answers:
    """Let tasks answer about a picture: a batch with a row for each.

    Raises:
        ImageError: The picture cannot be used.
        UnknownNameError: There is no such task, or it was removed meanwhile.
        SettingError: No task is named.
    """
    if not names:
        raise SettingError("Choose one task at least.")
    fleet = visitor.stage.fleet
    with ExitStack() as using:
        tasks = [using.enter_context(visitor.using(name)) for name in names]
        read = read_picture(picture, fleet.preprocessing.size)
        row = fleet.preprocessing(read.image)
        batch = np.repeat(row[None], len(tasks), axis=0)
        keys = [task.key for task in tasks]
        start = time.perf_counter()
        answers = fleet.predict(batch, keys)
        seconds = time.perf_counter() - start
        switch = _switch(visitor, keys)
    found = {
        name: ranked(answer.logits[None], answer.classes, top)[0]
        for name, answer in zip(names, answers, strict=True)
    }
    return Answers(found, seconds, switch, read.width, read.height)


def _switch(visitor: Visitor, keys: Sequence[str]) -> float:
    """What a request spends on going to its tasks: finding their numbers."""
    start = time.perf_counter()
    visitor.stage.fleet.prefetch(keys)
    return time.perf_counter() - start
