"""Classify images with any exported artefact.

This module needs neither torch nor timm, unless the artefact does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aoft_deploy.artefacts.description import ArtefactInfo, check_classes
from aoft_deploy.artefacts.engine import Engine, EngineOptions
from aoft_deploy.artefacts.registry import load_artefact
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import ArtefactError, SettingError, UnknownNameError, VerificationError

__all__ = ["Classifier", "Prediction", "load_classifier", "ranked"]


class Prediction(NamedTuple):
    """A class and its probability."""

    label: str
    probability: float


@dataclass(frozen=True)
class Classifier:
    """Classifies images with an artefact.

    Attributes:
        engine: Computes the logits.
        classes: Class names, in the order of the logits.
        preprocessing: Converts an image to the engine's input.
        task: Index of the task in a fleet; None if the artefact holds a single task.
    """

    engine: Engine
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    task: int | None = None

    def probabilities(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Probability of every class, (batch, classes), for RGB images in upright orientation.

        Raises:
            ArtefactError: The number of logits differs from the number of classes.
            VerificationError: A logit is not finite.
        """
        prepare = self.preprocessing.pixels if self.engine.takes_pixels else self.preprocessing
        batch = np.stack([prepare(image) for image in images])
        if self.task is None:
            logits = self.engine.run(batch)
        else:
            tasks = np.full(len(images), self.task)
            logits = self.engine.run(batch, tasks)[:, : len(self.classes)]
        if logits.shape != (len(images), len(self.classes)):
            raise ArtefactError(
                f"The artefact answers with shape {logits.shape} for {len(images)} images and "
                f"{len(self.classes)} classes: it was not written by aoft-export."
            )
        return _softmax(logits)

    def classify(self, images: Sequence[Image.Image], top: int = 1) -> list[list[Prediction]]:
        """The ``top`` most probable classes of each image, best first.

        Raises:
            ArtefactError: As for ``probabilities``.
            VerificationError: As for ``probabilities``.
        """
        return _best(self.probabilities(images), self.classes, top)


def ranked(logits: NDArray[np.float32], classes: Sequence[str], top: int) -> list[list[Prediction]]:
    """The ``top`` most probable classes of each row of logits, (batch, classes), best first.

    Raises:
        VerificationError: A logit is not finite.
    """
    return _best(_softmax(logits), classes, top)


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    invalid = ~np.isfinite(logits)
    if invalid.any():
        raise VerificationError(
            f"The artefact answers with {logits[invalid][0]}, not with a number for each class: "
            "export it with a higher `precision`."
        )
    odds = np.exp(logits - logits.max(1, keepdims=True))
    result: NDArray[np.float32] = odds / odds.sum(1, keepdims=True)
    return result


def _best(
    probabilities: NDArray[np.float32], classes: Sequence[str], top: int
) -> list[list[Prediction]]:
    rows = []
    for row in probabilities:
        best = np.argsort(-row, kind="stable")[:top]
        rows.append([Prediction(classes[i], float(row[i])) for i in best])
    return rows


def load_classifier(
    path: Path, task: str | None = None, options: EngineOptions = EngineOptions()
) -> Classifier:
    """Load an exported artefact as a classifier.

    Args:
        path: The artefact.
        task: Name of a task of a fleet; None for an artefact of a single task.
        options: Runtime, threads and device.

    Raises:
        ArtefactError: The file is not an artefact or is damaged, lacks classes or preprocessing, or
            has fewer than two classes.
        UnknownNameError: The fleet has no such task.
        SettingError: ``task`` is missing for a fleet, or given for an artefact of a single task.
    """
    engine = load_artefact(path, options)
    info = ArtefactInfo(engine.info, str(path))
    if not info.is_fleet:
        if task is not None:
            raise SettingError(f"{path} holds a single task: leave `task` out.")
        return Classifier(engine, info.classes, info.preprocessing)
    tasks = info.tasks
    if task is None:
        raise SettingError(f"{path} is a fleet of {len(tasks)} tasks: name one with `task`.")
    if task not in tasks:
        raise UnknownNameError("task", task, tasks)
    check_classes(tasks[task], f"The task {task} of {path}", ArtefactError)
    return Classifier(engine, tasks[task], info.preprocessing, list(tasks).index(task))
