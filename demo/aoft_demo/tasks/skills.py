"""What the bundled tasks can do: their measured accuracy, their limits, and example pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["Example", "Skill", "bundled_examples", "bundled_skills"]

_FOLDER = Path(__file__).parents[1] / "bundled"  # tools/demo_skills.py writes it


@dataclass(frozen=True)
class Skill:
    """A bundled task and how well it answers. Shares and probabilities are from 0 to 1.

    Attributes:
        name: The task's name, which is also that of its checkpoint.
        question: What it answers, in at most 40 characters.
        made_for: The pictures that it is meant for, in one short line.
        classes: Names of the classes, in the order of the logits.
        none_class: The class of pictures that the question does not fit, such as "no digit"; None
            if there is none.
        accuracy: Share of the test pictures that it answers correctly.
        test_pictures: Number of test pictures; none of them comes from a source of the training.
        test_photos: Number of photographs that test pictures were made from.
        source_photos: Number of photographs that training pictures were made from.
        threshold: Answers of a lower probability are "not sure".
        answered: Share of the test pictures that it answers at this threshold.
        accuracy_answered: Share of these answers that are correct.
        foreign: Share of foreign pictures on which it says "not sure" or ``none_class``; None if
            it was made for any picture.
        foreign_pictures: What the foreign pictures are; empty if there are none.
        sources: Where the pictures come from, and their licences.
    """

    name: str
    question: str
    made_for: str
    classes: tuple[str, ...]
    none_class: str | None
    accuracy: float
    test_pictures: int
    test_photos: int
    source_photos: int
    threshold: float
    answered: float
    accuracy_answered: float
    foreign: float | None
    foreign_pictures: str
    sources: str


@dataclass(frozen=True)
class Example:
    """An example picture. No skill was trained on the same photograph or kind of drawing.

    Attributes:
        file: The picture's path.
        caption: What it shows, in at most 24 characters.
        alt: The same in one sentence, for those who cannot see it.
    """

    file: Path
    caption: str
    alt: str


def bundled_skills() -> dict[str, Skill]:
    """The bundled tasks by name, in the order in which the page shows them."""
    skills = (
        Skill(**{**figures, "classes": tuple(figures["classes"])}) for figures in _cards()["skills"]
    )
    return {skill.name: skill for skill in skills}


def bundled_examples() -> list[Example]:
    """The example pictures, in the order in which the page shows them."""
    return [
        Example(**{**figures, "file": _FOLDER / figures["file"]})
        for figures in _cards()["examples"]
    ]


@cache
def _cards() -> dict[str, Any]:
    cards: dict[str, Any] = json.loads((_FOLDER / "skills.json").read_text("utf-8"))
    return cards
