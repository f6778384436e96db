"""Time verified artefacts against each other; stop timing those that can no longer be chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from math import prod
from pathlib import Path

from aoft_deploy.artefacts.description import ArtefactInfo
from aoft_deploy.artefacts.engine import EngineOptions
from aoft_deploy.artefacts.isolation import SubprocessEngine
from aoft_deploy.artefacts.registry import load_artefact
from aoft_deploy.artefacts.timing import Subject, Timing, interleaved
from aoft_deploy.export.race import Timed
from aoft_deploy.processors import processors

__all__ = ["beaten", "lane_counts", "timed"]

ROUNDS = 5
"""Timed runs of an artefact that is not beaten before."""

LEAST_ROUNDS = 2
"""Timed runs after which an artefact can be beaten."""

CLEARLY = 0.9
"""A beaten artefact has at most this share of the other one's throughput, besides the ranges."""


def timed(artefacts: Mapping[str, Path], batches: Sequence[int], goal: str) -> dict[str, Timed]:
    """Time artefacts in turn, each in a subprocess.

    For the goal ``latency``, an artefact computes one batch at a time on all processors. For
    ``throughput``, each is also timed with several lanes, which share the processors; the number of
    lanes with the highest mean throughput counts.

    Args:
        artefacts: The artefacts by name. Ratios are relative to the first one in one lane.
        batches: Batch sizes.
        goal: ``latency`` or ``throughput``.

    Returns:
        Ratios and number of lanes of each artefact, by name.
    """
    counts = lane_counts(processors()) if goal == "throughput" else [1]
    entries = [(name, lanes) for name in artefacts for lanes in counts]
    with ExitStack() as stack:
        subjects = [
            Subject.of(
                name,
                stack.enter_context(
                    SubprocessEngine(partial(load_artefact, artefacts[name], _options(lanes)))
                ),
                lanes,
            )
            for name, lanes in entries
        ]
        preprocessing = ArtefactInfo(subjects[0].engine.info).preprocessing
        size = (preprocessing.height, preprocessing.width)
        ratios: dict[tuple[str, int], dict[int, float]] = {entry: {} for entry in entries}
        for timing in interleaved(subjects, batches, size, ROUNDS, drop=beaten):
            ratios[timing.subject.name, timing.subject.lanes][timing.batch] = timing.ratio
    best: dict[str, Timed] = {}
    for (name, lanes), found in ratios.items():
        if name not in best or prod(found.values()) > prod(best[name].ratios.values()):
            best[name] = Timed(found, lanes)
    return best


def lane_counts(processors: int) -> list[int]:
    """Numbers of lanes to try: 1, 2, 4 … and as many as there are processors."""
    powers = [2**i for i in range(processors.bit_length()) if 2**i < processors]
    return [*powers, processors]


def beaten(timings: Sequence[Timing]) -> set[int]:
    """Which subjects are clearly slower than another one at every batch size.

    The other one is not slower than the first subject at any batch size, so it can be chosen. At
    each batch size, every ratio of the beaten subject is below every ratio of the other, and its
    median is at most ``CLEARLY`` times the other's. The first subject is never beaten, because the
    ratios refer to it.

    Args:
        timings: The timings so far, ordered by batch size, then by subject.

    Returns:
        The numbers of the beaten subjects.
    """
    batches = list(dict.fromkeys(timing.batch for timing in timings))
    count = len(timings) // len(batches)
    columns = [[timings[i * count + index] for i in range(len(batches))] for index in range(count)]
    if len(columns[0][0].ratios) < LEAST_ROUNDS:
        return set()
    able = [own for own in columns if all(timing.ratio >= 1 for timing in own)]
    return {
        index
        for index, own in enumerate(columns[1:], 1)
        if any(_clearly_slower(own, other) for other in able if other is not own)
    }


def _clearly_slower(own: Sequence[Timing], other: Sequence[Timing]) -> bool:
    return all(
        max(slow.ratios) < min(fast.ratios) and slow.ratio <= CLEARLY * fast.ratio
        for slow, fast in zip(own, other, strict=True)
    )


def _options(lanes: int) -> EngineOptions:
    return EngineOptions(threads=processors() if lanes == 1 else None, lanes=lanes)
