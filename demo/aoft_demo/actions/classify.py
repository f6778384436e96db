"""Classification of one picture by several tasks, in one pass through the backbone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aoft_demo.actions.pictures import read_picture
from aoft_demo.tasks.session import Session
from aoft_deploy.classes import Answer
from aoft_deploy.errors import SettingError
from aoft_deploy.fleet.fleet import Fleet

__all__ = ["Answers", "classify"]

TOP = 4


@dataclass(frozen=True)
class Answers:
    """Predictions of several tasks for one picture.

    Attributes:
        predictions: The most probable classes of each task, best first; of independent labels
            those above 0.5; or its values.
        seconds: Duration of the pass, for all tasks together.
        switch: Duration of a look-up of the tasks' parameters, in seconds.
        width: Width of the picture in pixels.
        height: Height of the picture in pixels.
    """

    predictions: dict[str, list[Answer]]
    seconds: float
    switch: float
    width: int
    height: int


def classify(session: Session, picture: Path, names: Sequence[str], top: int = TOP) -> Answers:
    """Classify a picture with several tasks: one batch, with one row per task.

    Args:
        session: Session with the tasks.
        picture: The picture's file.
        names: Names of the tasks.
        top: Number of classes to return for a task that chooses one of several.

    Raises:
        ImageError: The picture cannot be read.
        UnknownNameError: A task does not exist, or was removed in the meantime.
        SettingError: No task is given.
    """
    if not names:
        raise SettingError("Choose at least one task.")
    fleet = session.shared.fleet
    with ExitStack() as stack:
        tasks = [stack.enter_context(session.using(name)) for name in names]
        decoded = read_picture(picture, max(fleet.preprocessing.height, fleet.preprocessing.width))
        row = fleet.preprocessing(decoded.image)
        batch = np.repeat(row[None], len(tasks), axis=0)
        keys = [task.key for task in tasks]
        start = time.perf_counter()
        answers = fleet.predict(batch, keys)
        seconds = time.perf_counter() - start
        switch = _switch_seconds(fleet, keys)
    predictions = {
        name: answer.answers(usual=top) for name, answer in zip(names, answers, strict=True)
    }
    return Answers(predictions, seconds, switch, decoded.width, decoded.height)


def _switch_seconds(fleet: Fleet, keys: Sequence[str]) -> float:
    """Duration of the part of a request that depends on its tasks: finding their parameters."""
    start = time.perf_counter()
    fleet.prefetch(keys)
    return time.perf_counter() - start
