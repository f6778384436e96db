"""The states of a race as HTML; all texts are escaped.

All states have the same elements in the same order. The page then changes what differs, so that
the bars move.
"""

from __future__ import annotations

from base64 import b64encode
from html import escape
from typing import NamedTuple

import numpy as np

from aoft_demo.actions.race import LANES
from aoft_demo.actions.race_stages import Lane, Preparing, Stage, Standing, Waiting
from aoft_demo.views.race.picture import HEIGHT, WIDTH
from aoft_demo.views.race.texts import headline, lap_time, result_sentence, times
from aoft_demo.views.units import size

__all__ = ["failed_panel", "race_panel", "result_panel", "start_panel", "stopped_panel"]

NAMES = {
    "mixed": ("One pass", "all skills on one model"),
    "separate": ("Separate models", "one per skill, one after the other"),
    "peft": ("PEFT", "one model in PyTorch, a LoRA per skill"),
}

SLOWEST = 2.0
"""Seconds in which the longest bar grows at the end; all bars grow at the same speed."""


class Row(NamedTuple):
    """A bar.

    Attributes:
        share: Length, from 0 to 1.
        value: The number beside it.
        detail: Small print below the number.
        low: Start of the line in the bar, from 0 to 1.
        high: End of the line, from 0 to 1.
        absent: Why there is no bar; empty if there is one.
    """

    share: float = 0.0
    value: str = "–"
    detail: str = ""
    low: float = 0.0
    high: float = 0.0
    absent: str = ""


def start_panel() -> str:
    """Before the first race."""
    return _panel(
        "idle",
        "Which way answers fastest?",
        "Many pictures, each for one of your skills. Press Start: three ways to answer them take "
        "turns on this machine.",
        dict.fromkeys(LANES, Row()),
    )


def stopped_panel(message: str) -> str:
    """After a race that the visitor has stopped."""
    return _panel("idle", "Stopped", message, dict.fromkeys(LANES, Row()))


def failed_panel(message: str) -> str:
    """After a race that failed."""
    return _panel("failed", "No result", message, dict.fromkeys(LANES, Row()))


def race_panel(stage: Stage) -> str:
    """A race that waits, is prepared or runs."""
    if isinstance(stage, Waiting):
        races = "1 race" if stage.ahead == 1 else f"{stage.ahead} races"
        text = f"Another race is running: {races} before you."
        return _panel("running", "Waiting", text, dict.fromkeys(LANES, Row()), progress=0.0)
    if isinstance(stage, Preparing):
        text = f"{stage.text} … The first race of a skill takes longer than the next."
        share = stage.done / stage.steps
        rows = dict.fromkeys(LANES, Row())
        return _panel("running", "Getting ready", text, rows, progress=share)
    text = f"{stage.pictures} pictures for {len(stage.skills)} skills: three ways take turns."
    if any(lane.absent for lane in stage.lanes):
        text = text.replace("three ways", "the ways")
    return _panel("running", "Racing", text, _times(stage), memory=_memory(stage))


def result_panel(standing: Standing, svg: str) -> str:
    """The result of a race.

    Args:
        standing: The race at its end.
        svg: The picture to share.
    """
    return _panel(
        "done",
        headline(standing),
        result_sentence(standing),
        _times(standing),
        memory=_memory(standing),
        notes=_notes(standing) + _share(standing, svg),
    )


def _panel(
    state: str,
    title: str,
    text: str,
    rows: dict[str, Row],
    memory: dict[str, Row] | None = None,
    notes: str = "",
    progress: float | None = None,
) -> str:
    """A state of the race.

    Args:
        state: ``idle``, ``running``, ``done`` or ``failed``.
        title: Headline.
        text: Sentence below it.
        rows: Bars of the durations by contestant.
        memory: Bars of the memory by contestant.
        notes: HTML below the bars.
        progress: Share of the preparation that is done; None hides its bar.
    """
    role = "alert" if state == "failed" else "status"
    shown = "hidden" if progress is None else ""
    percent = round(100 * (progress or 0))
    return (
        f'<div class="race" data-state="{state}">'
        f'<div role="{role}"><h2>{escape(title)}</h2><p class="said">{escape(text)}</p></div>'
        f'<progress aria-label="Preparation" max="100" value="{percent}" {shown}></progress>'
        f"{_bars('Time for all pictures', 'shorter is faster', rows)}"
        f"{_bars('Memory for the weights', 'shorter is smaller', memory or {})}"
        f'<div class="notes">{notes}</div></div>'
    )


def _bars(name: str, hint: str, rows: dict[str, Row]) -> str:
    lanes = "".join(_lane(key, row) for key, row in rows.items())
    hidden = "" if rows else " hidden"
    return (
        f'<section class="lanes" aria-label="{name}"{hidden}>'
        f"<h3>{name} <small>{hint}</small></h3>{lanes}</section>"
    )


def _lane(key: str, row: Row) -> str:
    name, what = NAMES[key]
    if row.absent:
        bar = f'<p class="absent">{escape(row.absent)}</p>'
    else:
        bar = (
            f'<span class="track"><i style="width:{100 * row.share:.2f}%;'
            f'--run:{SLOWEST * row.share:.2f}s"></i>'
            f'<u style="left:{100 * row.low:.2f}%;width:{100 * (row.high - row.low):.2f}%"></u>'
            "</span>"
        )
    return (
        f'<div class="lane" data-lane="{key}"><div class="who"><b>{name}</b>'
        f"<small>{what}</small></div>{bar}"
        f'<div class="figure"><b>{escape(row.value)}</b><small>{escape(row.detail)}</small></div>'
        "</div>"
    )


def _times(standing: Standing) -> dict[str, Row]:
    present = [lane for lane in standing.lanes if lane.laps.seconds]
    scale = max((lane.laps.middle[1] for lane in present), default=0.0)
    return {lane.key: _time(lane, standing, scale) for lane in standing.lanes}


def _time(lane: Lane, standing: Standing, scale: float) -> Row:
    if lane.absent:
        return Row(absent=lane.absent)
    if not lane.laps.seconds:
        return Row()
    median, one = lane.laps.median, standing.lanes[0].laps.median
    low, high = lane.laps.middle
    ratio = times(median / one) if lane.key != "mixed" and one else ""
    return Row(
        share=median / scale,
        value=lap_time(median),
        detail=ratio,
        low=low / scale,
        high=high / scale,
    )


def _memory(standing: Standing) -> dict[str, Row]:
    present = {lane.key: lane.weights for lane in standing.lanes if not lane.absent}
    scale, one = max(present.values()), present["mixed"]
    return {
        key: Row(weights / scale, size(weights), times(weights / one) if key != "mixed" else "")
        for key, weights in present.items()
    }


def _notes(standing: Standing) -> str:
    return "".join(f'<p class="note {kind}">{escape(text)}</p>' for kind, text in _facts(standing))


def _facts(standing: Standing) -> list[tuple[str, str]]:
    """What is to be known of the result: a kind and a text each."""
    facts, agreement = [], standing.agreement
    if agreement is not None:
        same = agreement.agreeing == standing.pictures
        count = "all" if same else f"{agreement.agreeing} of"
        facts.append(
            (
                "good" if same else "bad",
                f"One pass and separate models decide alike for {count} {standing.pictures} "
                f"pictures. Largest difference between two scores: {_plain(agreement.difference)}, "
                f"where the largest score is {agreement.largest:.3g}.",
            )
        )
    if not standing.lanes[-1].absent:
        facts.append(
            (
                "",
                f"PEFT is another method. It runs here with random weights of rank {standing.rank}"
                " in the same layers, so only its time and memory can be compared.",
            )
        )
    if standing.per_skill < standing.asked:
        facts.append(
            (
                "",
                f"{standing.asked} pictures for each skill would take too long on this machine: "
                f"each skill got {standing.per_skill}.",
            )
        )
    if len(standing.skills) < standing.own_skills:
        facts.append(
            ("", f"{len(standing.skills)} of your {standing.own_skills} skills took part.")
        )
    facts.append(("", _measured(standing)))
    return facts


def _plain(number: float) -> str:
    """A number with two digits and without an exponent."""
    return np.format_float_positional(number, precision=2, fractional=False, trim="-")


def _measured(standing: Standing) -> str:
    """How the race was measured."""
    rounds = len(standing.lanes[0].laps.seconds)
    ranges = ", ".join(
        f"{NAMES[lane.key][0]} {lap_time(lane.laps.fastest)} to {lap_time(lane.laps.slowest)}"
        for lane in standing.lanes
        if not lane.absent
    )
    threads = "1 thread" if standing.threads == 1 else f"{standing.threads} threads"
    turns = "1 round" if rounds == 1 else f"Medians of {rounds} rounds in turn"
    return (
        f"{turns}, after a run of each to warm up, on {standing.processor} with {threads} for "
        f"each. The lines in the bars show the middle half of the rounds; fastest to slowest: "
        f"{ranges}. Other work of this machine slows all alike."
    )


def _share(standing: Standing, svg: str) -> str:
    """The picture to share and its button; the page's script makes a PNG of it."""
    data = b64encode(svg.encode()).decode()
    return (
        f'<div class="share"><img src="data:image/svg+xml;base64,{data}" width="{WIDTH}" '
        f'height="{HEIGHT}" alt="{escape(headline(standing))}">'
        '<button type="button" class="save">Save as a picture</button></div>'
    )
