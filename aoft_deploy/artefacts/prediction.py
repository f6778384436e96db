"""Classify images with any exported artefact.

This module needs neither torch nor timm, unless the artefact does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aoft_deploy.artefacts.description import ArtefactInfo
from aoft_deploy.artefacts.engine import Engine, EngineOptions
from aoft_deploy.artefacts.registry import load_artefact
from aoft_deploy.classes import Classes, check_classes
from aoft_deploy.data.image_inputs import ImageInput, Predictor, answer_each
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import ArtefactError, SettingError, UnknownNameError

__all__ = ["Classifier", "load_classifier"]


@dataclass(frozen=True)
class Classifier(Predictor):
    """Classifies images with an artefact.

    Attributes:
        engine: Computes the logits.
        classes: Class names, in the order of the logits, with their ``activation``.
        preprocessing: Converts an image to the engine's input.
        task: Index of the task in a fleet; None if the artefact holds a single task.
    """

    engine: Engine
    classes: Classes
    preprocessing: Preprocessing
    task: int | None = None

    def scores(self, images: Iterable[ImageInput]) -> NDArray[np.float32]:
        """Probability or value of every class, (batch, classes).

        Raises:
            AoftError: As for ``predict``.
        """
        rows = answer_each(images, lambda batch: [*self.classes.scores(self.image_logits(batch))])
        return np.reshape(rows, (-1, len(self.classes)))

    def image_logits(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Logits, (batch, classes), of upright RGB images.

        Raises:
            ArtefactError: The number of logits differs from the number of classes.
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
        return logits


def load_classifier(
    path: str | Path, task: str | None = None, options: EngineOptions = EngineOptions()
) -> Classifier:
    """Load an exported artefact as a classifier.

    Args:
        path: The artefact.
        task: Name of a task of a fleet; None for an artefact of a single task.
        options: Runtime, threads and device.

    Raises:
        ArtefactError: The file is not an artefact or is damaged, lacks classes or preprocessing, or
            has a softmax of one class.
        UnknownNameError: The fleet has no such task.
        SettingError: ``task`` is missing for a fleet, or given for an artefact of a single task.
    """
    engine = load_artefact(Path(path), options)
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
