"""How well a skill answers: its accuracy, its threshold, and what it says of foreign pictures."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from skills.photographs import PARTS, Part
from skills.questions import Maker, Question

from aoft_deploy.data.splits import ImageList
from aoft_deploy.tuning.tuned_model import TunedModel

__all__ = ["Answers", "foreign_list", "image_list", "threshold"]

WANTED = 0.95
"""The threshold is the least at which this share of the answers to validation pictures is right."""

THRESHOLDS = tuple(step / 100 for step in range(50, 100))


def image_list(maker: Maker, question: Question, part: Part, count: int, seed: int) -> ImageList:
    """Pictures of a part, with the classes in turn; the same arguments give the same pixels."""
    rng = np.random.default_rng([seed, PARTS.index(part), zlib.crc32(question.name.encode())])
    labels = [i % len(question.classes) for i in range(count)]
    return ImageList([question.picture(maker, rng, part, label) for label in labels], labels)


def foreign_list(maker: Maker, question: Question, count: int, seed: int) -> ImageList:
    """Test pictures of the class of a question that fits none."""
    assert question.none_class is not None
    label = question.classes.index(question.none_class)
    rng = np.random.default_rng([seed, len(PARTS), zlib.crc32(question.name.encode())])
    pictures = [question.picture(maker, rng, "test", label) for _ in range(count)]
    return ImageList(pictures, [label] * count)


@dataclass(frozen=True)
class Answers:
    """A skill's answers to pictures.

    Attributes:
        best: Index of the most probable class of each picture.
        probability: Its probability.
        labels: Index of the right class.
    """

    best: NDArray[np.int64]
    probability: NDArray[np.float32]
    labels: NDArray[np.int64]

    @classmethod
    def of(cls, tuned: TunedModel, images: ImageList) -> Answers:
        """The answers to a list of images."""
        logits = [
            tuned.image_logits([images[i][0] for i in range(start, min(start + 100, len(images)))])
            for start in range(0, len(images), 100)
        ]
        scores = tuned.classes.scores(np.concatenate(logits))
        return cls(scores.argmax(1), scores.max(1), np.array(images.labels))

    @property
    def right(self) -> NDArray[np.bool_]:
        """Whether each answer is right."""
        return np.asarray(self.best == self.labels)

    def accuracy(self) -> float:
        """Share of the pictures that are answered correctly."""
        return float(self.right.mean())

    def given(self, level: float) -> NDArray[np.bool_]:
        """Whether each answer is given: its probability reaches a threshold."""
        return np.asarray(self.probability >= level)


def threshold(answers: Answers) -> float:
    """The least threshold from 0.5 at which 95 % of the answers given are right, else 0.99."""
    for level in THRESHOLDS:
        given = answers.given(level)
        if given.any() and answers.right[given].mean() >= WANTED:
            return level
    return THRESHOLDS[-1]
