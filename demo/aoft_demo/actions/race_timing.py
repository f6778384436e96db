"""Timing of several contestants in turn, so that other work of the machine affects all alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

__all__ = ["BUDGET", "MOST_ROUNDS", "Laps", "laps_in_turn"]

BUDGET = 10.0
"""Seconds after which no further round begins."""

MOST_ROUNDS = 25


@dataclass(frozen=True)
class Laps:
    """The durations of one contestant's runs.

    Attributes:
        seconds: Duration of each run.
    """

    seconds: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        """The median in seconds; 0 before the first run."""
        return statistics.median(self.seconds) if self.seconds else 0.0

    @property
    def fastest(self) -> float:
        """The shortest run in seconds; 0 before the first run."""
        return min(self.seconds, default=0.0)

    @property
    def slowest(self) -> float:
        """The longest run in seconds; 0 before the first run."""
        return max(self.seconds, default=0.0)

    @property
    def middle(self) -> tuple[float, float]:
        """The first and the third quartile in seconds, between which half of the runs are."""
        if len(self.seconds) < 2:
            return self.median, self.median
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third


def laps_in_turn(
    runs: Sequence[Callable[[], object]],
    clock: Callable[[], float],
    before: Callable[[], None],
    budget: float = BUDGET,
) -> Iterator[tuple[Laps, ...]]:
    """Run all contestants in turn, round after round; every other round goes backwards.

    The first round always ends. A further round begins only if the longest one so far would end
    within the budget, and there are at most ``MOST_ROUNDS``.

    Args:
        runs: A run of each contestant.
        clock: Time in seconds.
        before: Called before each run, outside of its duration; what it raises ends the race.
        budget: Seconds for all rounds.

    Yields:
        The laps of each contestant so far, after each run.
    """
    laps = [Laps() for _ in runs]
    start, longest = clock(), 0.0
    for number in range(MOST_ROUNDS):
        began = clock()
        if number and began + longest - start > budget:
            return
        order = range(len(runs)) if number % 2 == 0 else reversed(range(len(runs)))
        for i in order:
            before()
            lap = clock()
            runs[i]()
            laps[i] = Laps((*laps[i].seconds, clock() - lap))
            yield tuple(laps)
        longest = max(longest, clock() - began)
