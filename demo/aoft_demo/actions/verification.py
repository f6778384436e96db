"""Proof that a task's answers are the same: unmerged model, merged model and fleet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aoft_demo.actions.pictures import read_picture
from aoft_demo.tasks.session import Session
from aoft_demo.tasks.shared_fleet import checkpoint_of
from aoft_deploy.artefacts.verification import random_pixels
from aoft_deploy.classes import Classes

__all__ = ["IMAGES", "Proof", "verify"]

IMAGES = 16
"""Number of built-in pictures."""

TOLERANCE = 5e-5
"""Largest allowed difference of a logit relative to the largest one, as in ``aoft-export``."""

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Proof:
    """Logits of one task from three models, for some pictures.

    Attributes:
        classes: The task's classes.
        unmerged: The model with the updates beside its frozen weights, float32 (pictures, classes);
            the first picture is the visitor's, the others are built in.
        merged: The model with the updates folded into its weights, of the same shape.
        fleet: The fleet that answers on the page, of the same shape.
    """

    classes: Classes
    unmerged: Logits
    merged: Logits
    fleet: Logits

    @property
    def largest(self) -> float:
        """The largest logit, as a scale for the differences."""
        return float(np.abs(self.unmerged).max())

    @property
    def merged_difference(self) -> float:
        """Largest difference of a logit between the merged and the unmerged model."""
        return float(np.abs(self.merged - self.unmerged).max())

    @property
    def fleet_difference(self) -> float:
        """Largest difference of a logit between the fleet and the unmerged model."""
        return float(np.abs(self.fleet - self.unmerged).max())

    @property
    def tolerance(self) -> float:
        """Largest difference of a logit with which ``aoft-export`` accepts a merged model."""
        return TOLERANCE * max(1.0, self.largest)

    @property
    def rounding(self) -> float:
        """Distance of neighbouring float32 numbers at the largest logit."""
        return float(np.spacing(np.float32(self.largest)))

    @property
    def digits(self) -> int:
        """Leading decimal digits of the largest logit that no difference reaches."""
        difference = max(self.merged_difference, self.fleet_difference, self.rounding)
        return int(np.log10(max(self.largest / difference, 1.0)))

    @property
    def agreeing(self) -> int:
        """Number of pictures for which all three decide alike; all if nothing is to decide."""
        alike = [self.classes.agreeing(it, self.unmerged) for it in (self.merged, self.fleet)]
        return int(np.logical_and(*alike).reshape(len(self.unmerged), -1).all(1).sum())

    @property
    def proved(self) -> bool:
        """Whether the differences are within the tolerance, and all pictures agree."""
        difference = max(self.merged_difference, self.fleet_difference)
        return difference <= self.tolerance and self.agreeing == len(self.unmerged)


def verify(session: Session, name: str, picture: Path) -> Proof:
    """Compute the logits of a task: unmerged model, merged model and fleet.

    Args:
        session: Session with the task.
        name: Name of the task.
        picture: The visitor's picture; built-in pictures follow.

    Raises:
        AoftError: The task has no checkpoint, it was removed in the meantime, its backbone cannot
            be created, or the picture cannot be read.
    """
    from aoft_deploy.checkpoints.backbone_source import BackboneSource
    from aoft_deploy.checkpoints.opening import open_checkpoint
    from aoft_deploy.data.normalisation import normalised
    from aoft_deploy.export.verifying import logits
    from aoft_deploy.tuning.merging import merge

    with session.using(name) as task:
        path = checkpoint_of(task, name)
        tuned, checkpoint = open_checkpoint(path, BackboneSource(weights=session.shared.weights))
        preprocessing = checkpoint.preprocessing
        size = max(preprocessing.height, preprocessing.width)
        own = preprocessing(read_picture(picture, size).image)
        pixels = random_pixels(IMAGES, preprocessing.height, preprocessing.width)
        built_in = normalised(pixels, preprocessing.mean, preprocessing.std)
        inputs = np.concatenate([own[None], built_in]).astype(np.float32)
        unmerged = logits(tuned.eval(), inputs)
        merged = logits(merge(tuned).eval(), inputs)
        answers = session.shared.fleet.predict(inputs, [task.key] * len(inputs))
        fleet = np.stack([answer.logits for answer in answers])
    return Proof(checkpoint.classes, unmerged, merged, fleet)
