"""One picture, many tasks, one pass through the backbone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aoft_demo.visitors import Visitor
from aoft_deploy.errors import SettingError
from aoft_deploy.images import read_image
from aoft_deploy.prediction import Prediction, ranked

__all__ = ["MAX_PIXELS", "Answers", "classify"]

MAX_PIXELS = 20_000_000
"""Of a picture; larger ones are refused from their header."""

TOP = 5


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
        UnknownNameError: There is no such task.
        SettingError: No task is named.
    """
    if not names:
        raise SettingError("Choose one task at least.")
    tasks = [visitor.task(name) for name in names]
    image = read_image(picture, max_pixels=MAX_PIXELS)
    fleet = visitor.stage.fleet
    row = fleet.preprocessing(image)
    batch = np.repeat(row[None], len(tasks), axis=0)
    keys = [task.key for task in tasks]
    start = time.perf_counter()
    answers = fleet.predict(batch, keys)
    seconds = time.perf_counter() - start
    found = {
        name: ranked(answer.logits[None], answer.classes, top)[0]
        for name, answer in zip(names, answers, strict=True)
    }
    return Answers(found, seconds, _switch(visitor, keys), image.width, image.height)


def _switch(visitor: Visitor, keys: Sequence[str]) -> float:
    """What a request spends on going to its tasks: finding their numbers."""
    start = time.perf_counter()
    visitor.stage.fleet.prefetch(keys)
    return time.perf_counter() - start
