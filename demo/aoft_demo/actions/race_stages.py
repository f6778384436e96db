"""What a race tells while it waits, is prepared and runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from aoft_demo.actions.race_timing import Laps

__all__ = ["Agreement", "Lane", "Preparing", "Stage", "Standing", "Waiting"]


@dataclass(frozen=True)
class Waiting:
    """The race waits for others.

    Attributes:
        ahead: Number of races before it.
    """

    ahead: int


@dataclass(frozen=True)
class Preparing:
    """The race is being prepared.

    Attributes:
        text: What is done now.
        done: Steps that are done.
        steps: Steps in all.
    """

    text: str
    done: int
    steps: int


@dataclass(frozen=True)
class Lane:
    """A contestant's part of the race.

    Attributes:
        key: ``mixed``, ``separate`` or ``peft``.
        laps: Its runs so far.
        weights: Bytes of the weights that it holds in memory.
        absent: Why it does not take part; empty if it does.
    """

    key: str
    laps: Laps = field(default_factory=Laps)
    weights: int = 0
    absent: str = ""


@dataclass(frozen=True)
class Agreement:
    """Comparison of the mixed batch's answers with those of the separate models.

    Attributes:
        largest: Largest logit, as a scale for the difference.
        difference: Largest difference between two logits.
        agreeing: Number of pictures for which both decide alike.
    """

    largest: float
    difference: float
    agreeing: int


@dataclass(frozen=True)
class Standing:
    """The race after some laps.

    Attributes:
        skills: Names of the skills.
        own_skills: Number of skills that the visitor has.
        per_skill: Pictures for each skill.
        asked: Pictures for each skill that were asked for.
        lanes: The contestants; ``mixed`` first.
        agreement: Comparison of the answers; None if there are no separate models.
        rank: Rank of PEFT's LoRA.
        processor: Name of the processor.
        threads: Threads of each contestant.
        finished: Whether the race has ended.
    """

    skills: tuple[str, ...]
    own_skills: int
    per_skill: int
    asked: int
    lanes: tuple[Lane, ...]
    agreement: Agreement | None
    rank: int
    processor: str
    threads: int
    finished: bool = False

    @property
    def pictures(self) -> int:
        """Number of pictures in the batch."""
        return len(self.skills) * self.per_skill


Stage = Waiting | Preparing | Standing
