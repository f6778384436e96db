"""What a race showed, in words; the page and the picture to share say the same."""

from __future__ import annotations

from aoft_demo.actions.race_stages import Lane, Standing
from aoft_demo.actions.race_timing import Laps
from aoft_demo.views.units import size

__all__ = ["headline", "lane_name", "lap_time", "result_sentence", "times"]

EQUAL = 0.05
"""Share by which two durations may differ and still count as equal."""


def headline(standing: Standing) -> str:
    """The result in one line; it names a winner only if most rounds agree on it."""
    one, *rivals = (lane for lane in standing.lanes if not lane.absent)
    if not rivals:
        return f"One pass answers {standing.pictures} pictures in {lap_time(one.laps.median)}"
    rival = rivals[0]
    name, ratio = lane_name(rival, standing), rival.laps.median / one.laps.median
    pairs = zip(rival.laps.seconds, one.laps.seconds, strict=True)
    low, high = Laps(tuple(theirs / ours for theirs, ours in pairs)).middle
    if abs(ratio - 1) <= EQUAL:
        return f"One pass and {name} are equally fast here"
    if low > 1 and ratio > 1:
        return f"One pass is {times(ratio)} as fast as {name}"
    if high < 1 and ratio < 1:
        return f"One pass is slower than {name} here"
    return f"One pass or {name}: too close to call"


def result_sentence(standing: Standing) -> str:
    """The durations of all contestants and their memory, in two sentences."""
    count, skills = standing.pictures, len(standing.skills)
    if skills == 1:
        what = f"{_plural(count, 'picture')} for 1 skill"
    elif standing.per_skill == 1:
        what = f"{count} pictures, each for another skill"
    else:
        what = f"{count} pictures for {skills} skills"
    one, *rivals = (lane for lane in standing.lanes if not lane.absent)
    parts = [f"one pass took {lap_time(one.laps.median)}"]
    parts += [_compared(rival, one, standing) for rival in rivals]
    return f"{what}: {'; '.join(parts)}. {_memory(standing)}"


def _memory(standing: Standing) -> str:
    one, *rivals = (lane for lane in standing.lanes if not lane.absent)
    if not rivals:
        return f"Memory: {size(one.weights)}."
    others = " and ".join(
        f"{size(rival.weights)}{' (PEFT)' if rival.key == 'peft' else ''}" for rival in rivals
    )
    return f"Memory: {size(one.weights)} against {others}."


def lane_name(lane: Lane, standing: Standing) -> str:
    """A contestant's name within a sentence."""
    if lane.key == "separate":
        return _plural(len(standing.skills), "separate model")
    return {"mixed": "one pass", "peft": "PEFT"}[lane.key]


def lap_time(seconds: float) -> str:
    """A duration with two or three digits."""
    if seconds >= 0.9995:
        return f"{seconds:.1f} s"
    return f"{1e3 * seconds:.0f} ms" if seconds >= 0.01 else f"{1e3 * seconds:.1f} ms"


def times(ratio: float) -> str:
    """A factor with two digits."""
    return f"{ratio:.0f} ×" if ratio >= 10 else f"{ratio:.1f} ×" if ratio >= 1 else f"{ratio:.2f} ×"


def _compared(rival: Lane, one: Lane, standing: Standing) -> str:
    ratio = rival.laps.median / one.laps.median
    words = f"{lane_name(rival, standing)} {lap_time(rival.laps.median)}"
    if ratio < 1 - EQUAL:
        return f"{words}, which is faster ({times(ratio)} the time)"
    return f"{words} ({times(ratio)} the time)"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
