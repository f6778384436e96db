"""Contestants take turns, and the rounds end within the budget."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from aoft_demo.actions.race_timing import MOST_ROUNDS, Laps, laps_in_turn


class Track:
    """A clock that only the contestants' runs and the rests advance."""

    def __init__(self) -> None:
        self.now, self.runs = 100.0, ""

    def clock(self) -> float:
        return self.now

    def contestant(self, name: str, *seconds: float) -> Callable[[], None]:
        """A contestant whose runs take these seconds, the last ones again and again."""
        left = list(seconds)

        def run() -> None:
            self.runs += name
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run

    def rest(self) -> None:
        self.now += 0.25


def test_all_take_turns_and_every_other_round_goes_backwards() -> None:
    track = Track()
    runs = [track.contestant("a", 1.0, 3.0, 2.0), track.contestant("b", 0.5)]
    *_, laps = laps_in_turn(runs, track.clock, track.rest, budget=6.6)
    assert track.runs == "abba"
    assert laps == (Laps((1.0, 3.0)), Laps((0.5, 0.5)))


def test_the_laps_so_far_are_told_after_each_run() -> None:
    track = Track()
    runs = [track.contestant("a", 1.0), track.contestant("b", 2.0)]
    told = list(laps_in_turn(runs, track.clock, track.rest, budget=4.0))
    assert told == [(Laps((1.0,)), Laps()), (Laps((1.0,)), Laps((2.0,)))]


@pytest.mark.parametrize(
    ("seconds", "rounds"), [(0.75, 10), (4.75, 2), (5.0, 1), (60.0, 1), (0.0, MOST_ROUNDS)]
)
def test_no_round_begins_that_would_exceed_the_budget(seconds: float, rounds: int) -> None:
    track = Track()
    *_, (laps,) = laps_in_turn(
        [track.contestant("a", seconds)], track.clock, track.rest, budget=10.0
    )
    assert laps.seconds == (seconds,) * rounds


def test_a_rest_that_fails_ends_the_race() -> None:
    track = Track()

    def stopped() -> None:
        if track.runs == "a":
            raise KeyError("stopped")

    race = laps_in_turn([track.contestant("a", 1.0)] * 2, track.clock, stopped)
    assert next(race) == (Laps((1.0,)), Laps())
    with pytest.raises(KeyError, match="stopped"):
        next(race)


def test_the_summary_of_laps() -> None:
    laps = Laps((5.0, 1.0, 2.0, 4.0, 30.0))
    assert (laps.fastest, laps.median, laps.slowest) == (1.0, 4.0, 30.0)
    assert laps.middle == (2.0, 5.0)
    assert Laps((3.0,)).middle == (3.0, 3.0)
    assert (Laps().fastest, Laps().median, Laps().slowest, Laps().middle) == (0, 0, 0, (0, 0))
