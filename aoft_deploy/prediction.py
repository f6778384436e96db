"""Images in, labelled probabilities out, with any exported artefact.

Needs neither torch nor timm, unless the artefact itself does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aoft_deploy.engines import Engine, load_artefact
from aoft_deploy.errors import CheckpointError
from aoft_deploy.preprocessing import Preprocessing

__all__ = ["Classifier", "Prediction", "load_classifier"]


class Prediction(NamedTuple):
    """A class and its probability."""

    label: str
    probability: float


@dataclass(frozen=True)
class Classifier:
    """An artefact with what it needs to answer about images.

    Attributes:
        engine: What computes the logits.
        classes: Class names, in the order of the logits.
        preprocessing: How an image becomes the engine's input.
    """

    engine: Engine
    classes: tuple[str, ...]
    preprocessing: Preprocessing

    def probabilities(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Probability of every class, (batch, classes), for upright RGB images."""
        prepare = self.preprocessing.pixels if self.engine.takes_pixels else self.preprocessing
        logits = self.engine.run(np.stack([prepare(image) for image in images]))
        if logits.shape != (len(images), len(self.classes)):
            raise CheckpointError(
                f"The artefact answers with shape {logits.shape} for {len(images)} images and "
                f"{len(self.classes)} classes: it was not written by aoft-export."
            )
        odds = np.exp(logits - logits.max(1, keepdims=True))
        result: NDArray[np.float32] = odds / odds.sum(1, keepdims=True)
        return result

    def classify(self, images: Sequence[Image.Image], top: int = 1) -> list[list[Prediction]]:
        """The ``top`` most probable classes of each image, best first."""
        ranked = []
        for row in self.probabilities(images):
            best = np.argsort(-row, kind="stable")[:top]
            ranked.append([Prediction(self.classes[i], float(row[i])) for i in best])
        return ranked


def load_classifier(path: Path) -> Classifier:
    """Open an exported artefact.

    Raises:
        CheckpointError: The file is no artefact, damaged, or lacks classes or preprocessing.
    """
    engine = load_artefact(path)
    try:
        classes = tuple(json.loads(engine.info["classes"]))
        preprocessing = Preprocessing.from_dict(json.loads(engine.info["preprocessing"]))
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} names no classes and preprocessing: it was not written by aoft-export."
        ) from error
    return Classifier(engine, classes, preprocessing)
