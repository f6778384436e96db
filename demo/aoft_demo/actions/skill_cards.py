"""What the page says about a task: its question, its limits, and how often it is right."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from aoft_demo.tasks.session import Session
from aoft_demo.tasks.shared_fleet import BUNDLED, Task
from aoft_demo.tasks.skills import Skill, bundled_skills
from aoft_deploy.checkpoints.file_format import parse_description, read_described, read_sizes
from aoft_deploy.errors import AoftError

__all__ = ["UNSURE_BELOW", "SkillCard", "skill_card"]

UNSURE_BELOW = 0.5
"""Threshold of a task that has no card."""


@dataclass(frozen=True)
class SkillCard:
    """What is known about a task. Shares and probabilities are from 0 to 1.

    Attributes:
        question: What it answers; the task's name if it has no card.
        made_for: The pictures that it is meant for; empty if that is unknown.
        accuracy: Share of the pictures that it answers correctly; None if that is unknown.
        pictures: What ``accuracy`` was measured on.
        threshold: Answers of a lower probability are "not sure".
        none_class: The class of pictures that the question does not fit; None if there is none.
    """

    question: str
    made_for: str
    accuracy: float | None
    pictures: str
    threshold: float
    none_class: str | None = None

    @property
    def right(self) -> str:
        """How often it is right, as a phrase; 100 % only if always. Empty if that is unknown."""
        if self.accuracy is None:
            return ""
        return f"right on {percent(self.accuracy)} of {self.pictures}"


def percent(share: float) -> str:
    """A share in percent, rounded down: 100 % only if it is all."""
    return f"{math.floor(100 * share + 1e-9)}%"


def skill_card(session: Session, name: str) -> SkillCard:
    """The card of a session's task.

    Raises:
        UnknownNameError: There is no such task.
    """
    task = session.task(name)
    skill = _bundled(task)
    if skill is not None:
        pictures = f"{skill.test_pictures} test pictures"
        return SkillCard(
            skill.question,
            skill.made_for,
            skill.accuracy,
            pictures,
            skill.threshold,
            skill.none_class,
        )
    accuracy, pictures = (None, "") if task.checkpoint is None else _measured(task.checkpoint)
    return SkillCard(name, "", accuracy, pictures, UNSURE_BELOW)


def _bundled(task: Task) -> Skill | None:
    """The card of a bundled task; None for other tasks."""
    path = task.checkpoint
    return bundled_skills().get(path.stem) if path and path.parent == BUNDLED else None


@lru_cache(maxsize=1024)
def _measured(checkpoint: Path) -> tuple[float | None, str]:
    """The accuracy that a checkpoint states, and on what it was measured."""
    try:
        _, text = read_described(checkpoint, read_sizes)
        figures: dict[str, Any] = parse_description(checkpoint, text)["training"]
    except AoftError:
        return None, ""
    for part, pictures in (("test", "test pictures"), ("val", "pictures kept aside")):
        value = figures.get(f"{part}_accuracy")
        if isinstance(value, int | float) and 0 <= value <= 1:
            return float(value), pictures
    return None, ""
