"""Tasks that come and go: their bytes, and whether merged, unmerged and fleet agree."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aoft_demo.tasks.shared_fleet import checkpoint_of, task_bytes
from aoft_demo.tasks.visitors import Visitor
from aoft_deploy.artefacts.verification import random_pixels

__all__ = ["Agreement", "Resident", "residents", "verify"]

IMAGES = 16


@dataclass(frozen=True)
class Resident:
    """A task in memory.

    Attributes:
        name: What the visitor calls it.
        classes: Their number.
        bytes: What its numbers take.
        origin: See ``Task``.
    """

    name: str
    classes: int
    bytes: int
    origin: str


@dataclass(frozen=True)
class Agreement:
    """Three ways to the same answers, compared on built-in pictures.

    Attributes:
        images: How many.
        largest: Largest logit, to compare the differences with.
        merged: Largest difference of a logit between merged and unmerged model.
        fleet: The same between the fleet and the unmerged model.
        agreeing: Pictures on which all three name the same class.
    """

    images: int
    largest: float
    merged: float
    fleet: float
    agreeing: int


def residents(visitor: Visitor) -> list[Resident]:
    """A visitor's tasks."""
    fleet = visitor.stage.fleet
    return [
        Resident(name, len(task.classes), task_bytes(fleet, task.classes), task.origin)
        for name, task in visitor.tasks.items()
    ]


def verify(visitor: Visitor, name: str) -> Agreement:
    """Compare a task's answers: unmerged, merged, and by the fleet.

    Raises:
        AoftError: The task has no checkpoint, it was removed meanwhile, or its backbone cannot be
            made.
    """
    from aoft_deploy.checkpoints.backbone_source import BackboneSource
    from aoft_deploy.checkpoints.opening import open_checkpoint
    from aoft_deploy.export.merged import logits, normalised
    from aoft_deploy.tuning.merging import merge

    with visitor.using(name) as task:
        source = checkpoint_of(task, name)
        tuned, checkpoint = open_checkpoint(source, BackboneSource(weights=visitor.stage.weights))
        preprocessing = checkpoint.preprocessing
        inputs = normalised(random_pixels(IMAGES, preprocessing.size), preprocessing)
        own = logits(tuned.eval(), inputs)
        merged = logits(merge(tuned).eval(), inputs)
        answers = visitor.stage.fleet.predict(inputs, [task.key] * IMAGES)
        fleet = np.stack([answer.logits for answer in answers])
    top = own.argmax(1)
    agreeing = (merged.argmax(1) == top) & (fleet.argmax(1) == top)
    return Agreement(
        IMAGES,
        float(np.abs(own).max()),
        float(np.abs(merged - own).max()),
        float(np.abs(fleet - own).max()),
        int(agreeing.sum()),
    )
