"""Comparison of a task's logits: unmerged model, merged model and fleet."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aoft_demo.tasks.session import Session
from aoft_demo.tasks.shared_fleet import checkpoint_of
from aoft_deploy.artefacts.verification import random_pixels

__all__ = ["Agreement", "verify"]

IMAGES = 16


@dataclass(frozen=True)
class Agreement:
    """Result of the comparison on built-in pictures.

    Attributes:
        images: Number of pictures.
        largest: Largest logit, as a scale for the differences.
        merged: Largest difference between a logit of the merged and of the unmerged model.
        fleet: Largest difference between a logit of the fleet and of the unmerged model.
        agreeing: Number of pictures for which all three decide alike; all if there is nothing to
            decide.
    """

    images: int
    largest: float
    merged: float
    fleet: float
    agreeing: int


def verify(session: Session, name: str) -> Agreement:
    """Compare the logits of a task: unmerged model, merged model and fleet.

    Raises:
        AoftError: The task has no checkpoint, it was removed in the meantime, or its backbone
            cannot be created.
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
        pixels = random_pixels(IMAGES, preprocessing.height, preprocessing.width)
        inputs = normalised(pixels, preprocessing.mean, preprocessing.std)
        unmerged = logits(tuned.eval(), inputs)
        merged = logits(merge(tuned).eval(), inputs)
        answers = session.shared.fleet.predict(inputs, [task.key] * IMAGES)
        fleet = np.stack([answer.logits for answer in answers])
    alike = [checkpoint.classes.agreeing(found, unmerged) for found in (merged, fleet)]
    agreeing = np.logical_and(*alike).reshape(IMAGES, -1).all(1)
    return Agreement(
        images=IMAGES,
        largest=float(np.abs(unmerged).max()),
        merged=float(np.abs(merged - unmerged).max()),
        fleet=float(np.abs(fleet - unmerged).max()),
        agreeing=int(agreeing.sum()),
    )
