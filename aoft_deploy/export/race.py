"""Compare candidates by their speed at several batch sizes, and choose one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from aoft_deploy.artefacts.machine import machine
from aoft_deploy.processors import processors

__all__ = ["GOALS", "Candidate", "Race", "Timed", "criterion"]

GOALS = ("latency", "throughput")
"""What to be fast at: one batch at a time, or several batches at once."""


@dataclass(frozen=True)
class Timed:
    """How fast an artefact is.

    Attributes:
        ratios: Throughput at each batch size relative to the first candidate in one lane.
        lanes: Number of batches computed at once.
    """

    ratios: Mapping[int, float]
    lanes: int = 1


@dataclass(frozen=True)
class Candidate:
    """An exporter and a precision, with the result.

    Attributes:
        to: Name of the exporter.
        precision: Precision of the artefact.
        ratios: Throughput at each batch size relative to the first candidate in one lane; empty if
            the candidate was not exported.
        reason: Why the candidate was not exported; empty if it was.
        slower_at: Batch sizes at which it is slower than the fp32 candidate that it is compared
            with. If there is one, the candidate is not chosen.
        lanes: Number of batches that were computed at once.
    """

    to: str
    precision: str
    ratios: Mapping[int, float] = field(default_factory=dict)
    reason: str = ""
    slower_at: tuple[int, ...] = ()
    lanes: int = 1

    @property
    def name(self) -> str:
        """Exporter and precision, such as ``onnx int8``."""
        return f"{self.to} {self.precision}"

    def to_dict(self) -> dict[str, Any]:
        """JSON values; empty ones are left out."""
        entries = {
            "exporter": self.to,
            "precision": self.precision,
            "ratios": dict(self.ratios),
            "left_out": self.reason,
            "slower_than_fp32_at": list(self.slower_at),
            "lanes": self.lanes if self.lanes > 1 else None,
        }
        return {name: value for name, value in entries.items() if value}


@dataclass(frozen=True)
class Race:
    """The result of timing the candidates in one interleaved run.

    Attributes:
        batches: Batch sizes.
        candidates: All candidates, timed or left out.
        chosen: The candidate that ``criterion`` decides for.
        goal: One of ``GOALS``.
    """

    batches: Sequence[int]
    candidates: Sequence[Candidate]
    chosen: Candidate
    goal: str = GOALS[0]

    @classmethod
    def of(cls, candidates: Sequence[Candidate], goal: str = GOALS[0]) -> Race:
        """Choose the fastest candidate that is not slower than fp32 at any batch size.

        First, choose the fastest fp32 candidate that is not slower than the first candidate at any
        batch size. Then choose the fastest candidate of a lower precision that is not slower than
        that fp32 candidate at any batch size, if there is one. The fastest has the largest
        geometric mean of its ratios.

        Args:
            candidates: All candidates. One or more have ratios, fp32 before others.
            goal: One of ``GOALS``.
        """
        timed = [each for each in candidates if each.ratios]
        first = timed[0]
        fp32 = _fastest(first, (each for each in timed if each.precision == "fp32"))
        chosen = _fastest(fp32, (each for each in timed if each.precision != "fp32"))
        judged = [
            replace(each, slower_at=_slower_at(each, first if each.precision == "fp32" else fp32))
            for each in candidates
        ]
        return cls(tuple(first.ratios), judged, chosen, goal)

    def fastest(self, batch: int) -> Candidate:
        """The fastest candidate at a batch size, whether chosen or not."""
        timed = (candidate for candidate in self.candidates if candidate.ratios)
        return max(timed, key=lambda candidate: candidate.ratios[batch])

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "goal": self.goal,
            "criterion": criterion(self.batches, self.goal),
            "batches": list(self.batches),
            "lanes": self.chosen.lanes,
            "fastest": {batch: self.fastest(batch).name for batch in self.batches},
            "machine": machine(processors()),
            "among": [candidate.to_dict() for candidate in self.candidates],
        }


def criterion(batches: Sequence[int], goal: str = GOALS[0]) -> str:
    """Describe how a race is decided, as a phrase."""
    sizes = " and ".join(map(str, batches))
    how = "" if goal == "latency" else ", with as many batches at once as suit it"
    if len(batches) == 1:
        return f"the verified artefact that is fastest at batch {sizes}{how}"
    return (
        f"the verified artefact that is fastest on average at batch {sizes}{how}, and slower than "
        "fp32 at none of them"
    )


def _fastest(baseline: Candidate, candidates: Iterable[Candidate]) -> Candidate:
    """The fastest candidate, or the baseline if every faster one is slower at a batch size."""
    fitting = (each for each in candidates if not _slower_at(each, baseline))
    return max((baseline, *fitting), key=lambda candidate: prod(candidate.ratios.values()))


def _slower_at(candidate: Candidate, baseline: Candidate) -> tuple[int, ...]:
    """Batch sizes at which a candidate is slower than the baseline."""
    return tuple(b for b, ratio in candidate.ratios.items() if ratio < baseline.ratios[b])
