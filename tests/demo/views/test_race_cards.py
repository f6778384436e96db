"""The words, the bars and the picture of a race."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from datetime import date
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from aoft_demo.actions.race_stages import Agreement, Lane, Preparing, Standing, Waiting
from aoft_demo.actions.race_timing import Laps
from aoft_demo.views.race import cards
from aoft_demo.views.race.picture import HEIGHT, WIDTH, race_picture
from aoft_demo.views.race.texts import headline, lap_time, result_sentence, times

HOSTILE = '<img src=x onerror="alert(1)">'
DAY = date(2026, 3, 9)


def standing(*seconds: tuple[float, ...], **more: object) -> Standing:
    """A race of eight skills between as many contestants as there are durations."""
    keys, weights = ("mixed", "separate", "peft"), (11_000_000, 88_000_000, 16_500_000)
    lanes = [Lane(*x) for x in zip(keys, map(Laps, seconds), weights, strict=False)]
    lanes += [Lane(key, absent=f"No {key}: {HOSTILE}") for key in keys[len(lanes) :]]
    values: dict[str, object] = {
        "skills": tuple(f"skill {i}" for i in range(8)),
        "own_skills": 8,
        "per_skill": 4,
        "asked": 4,
        "lanes": tuple(lanes),
        "agreement": Agreement(17.46, 7.8678e-06, 32) if len(seconds) > 1 else None,
        "rank": 64,
        "processor": "A Processor",
        "threads": 2,
        "finished": True,
    }
    return Standing(**{**values, **more})  # type: ignore[arg-type]


FASTER = standing((0.041,) * 3, (0.118, 0.117, 0.119), (0.0961, 0.096, 0.0959))
SLOWER = standing((0.1, 0.11, 0.12), (0.08, 0.088, 0.09), (0.2, 0.2, 0.2))


def test_the_result_in_words() -> None:
    assert headline(FASTER) == "One pass is 2.9 × as fast as 8 separate models"
    assert result_sentence(FASTER) == (
        "32 pictures for 8 skills: one pass took 41 ms; 8 separate models 118 ms (2.9 × the "
        "time); PEFT 96 ms (2.3 × the time). Memory: 11.0 MB against 88.0 MB and 16.5 MB (PEFT)."
    )
    each = replace(FASTER, per_skill=1)
    assert result_sentence(each).startswith("8 pictures, each for another skill: one pass")
    one = replace(FASTER, skills=("a",), per_skill=1)
    assert result_sentence(one).startswith("1 picture for 1 skill: one pass took")
    assert "1 separate model 118 ms" in result_sentence(one)


def test_a_slower_pass_is_said_as_plainly() -> None:
    assert headline(SLOWER) == "One pass is slower than 8 separate models here"
    assert "8 separate models 88 ms, which is faster (0.80 × the time)" in result_sentence(SLOWER)
    assert "PEFT 200 ms (1.8 × the time)" in result_sentence(SLOWER)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ((1.0, 1.0, 1.0), (1.04, 1.04, 1.04), "equally fast here"),
        ((1.0, 1.0, 1.0), (0.97, 0.96, 0.99), "equally fast here"),
        ((1.0, 2.0, 1.0, 2.0), (1.8, 1.6, 1.7, 1.5), "too close to call"),
        ((1.0, 1.0, 1.0), (1.2, 1.2, 1.1), "1.2 × as fast"),
        ((1.0, 2.0, 2.0), (3.0, 6.0, 9.0), "3.0 × as fast"),
        ((1.0,), (0.5,), "slower"),
    ],
)
def test_a_winner_is_named_only_if_most_rounds_agree(
    ours: tuple[float, ...], theirs: tuple[float, ...], expected: str
) -> None:
    assert expected in headline(standing(ours, theirs, ours))


def test_a_race_without_rivals() -> None:
    alone = standing((0.02, 0.03, 0.04))
    assert headline(alone) == "One pass answers 32 pictures in 30 ms"
    assert (
        result_sentence(alone) == "32 pictures for 8 skills: one pass took 30 ms. Memory: 11.0 MB."
    )
    html = cards.result_panel(alone, race_picture(alone, DAY))
    assert "No peft: &lt;img" in html and "random weights" not in html and "alike for" not in html


def test_durations_and_factors_have_few_digits() -> None:
    shown = [lap_time(x) for x in (0.00123, 0.00996, 0.0412, 0.9994, 0.9996, 12.34)]
    assert shown == ["1.2 ms", "10.0 ms", "41 ms", "999 ms", "1.0 s", "12.3 s"]
    assert [times(x) for x in (0.884, 1.0, 2.94, 12.3)] == ["0.88 ×", "1.0 ×", "2.9 ×", "12 ×"]


def bars(html: str, section: str) -> dict[str, float]:
    """Lengths of the bars of a section in percent, by contestant."""
    part = html.partition(f'aria-label="{section}')[2].partition("</section>")[0]
    found = re.findall(r'data-lane="(\w+)".*?<i style="width:([\d.]+)%', part)
    return {lane: float(width) for lane, width in found}


def test_the_bars_are_proportional_from_zero() -> None:
    html = cards.result_panel(FASTER, race_picture(FASTER, DAY))
    seconds, memory = bars(html, "Time"), bars(html, "Memory")
    assert seconds["separate"] == pytest.approx(100 * 0.118 / 0.1185, abs=0.01)  # third quartile
    assert seconds["mixed"] / seconds["separate"] == pytest.approx(41 / 118, rel=1e-3)
    assert seconds["peft"] / seconds["separate"] == pytest.approx(96 / 118, rel=1e-3)
    assert memory == {"mixed": 12.5, "separate": 100, "peft": 18.75}
    low, width = re.findall(r'<u style="left:([\d.]+)%;width:([\d.]+)%', html)[1]
    assert float(low) == pytest.approx(100 * 0.1175 / 0.1185, abs=0.01)
    assert float(low) + float(width) == pytest.approx(100, abs=0.02)


def test_each_lane_says_its_factor_and_its_number() -> None:
    html = cards.result_panel(FASTER, race_picture(FASTER, DAY))
    figures = re.findall(r'<div class="figure"><b>([^<]*)</b><small>([^<]*)<', html)
    assert figures == [
        ("41 ms", ""),
        ("118 ms", "2.9 ×"),
        ("96 ms", "2.3 ×"),
        ("11.0 MB", ""),
        ("88.0 MB", "8.0 ×"),
        ("16.5 MB", "1.5 ×"),
    ]
    svg = race_picture(FASTER, DAY)
    texts = [str(text.text) for text in ElementTree.fromstring(svg).findall(".//{*}text")]
    assert {"118 ms  2.9 ×", "96 ms  2.3 ×", "88.0 MB  8.0 ×", "41 ms"} <= set(texts)


def test_a_contestant_that_is_absent_has_no_memory() -> None:
    html = cards.result_panel(standing((0.02,)), "<svg/>")
    assert bars(html, "Memory") == {"mixed": 100} and "0 bytes" not in html


class Elements(HTMLParser):
    """The tags of HTML with their depths; all of them are closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.depth, self.found = 0, list[tuple[int, str]]()
        self.feed(html)
        assert self.depth == 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.found.append((self.depth, tag))
        self.depth += tag != "img"

    def handle_endtag(self, tag: str) -> None:
        self.depth -= 1


def test_all_states_have_the_same_elements_so_that_the_bars_can_move() -> None:
    running = replace(FASTER, finished=False)
    started = replace(running, lanes=tuple(replace(x, laps=Laps()) for x in running.lanes))
    states = [cards.race_panel(started), cards.race_panel(running)]
    states.append(
        cards.result_panel(FASTER, "<svg/>").partition('<p class="note')[0] + "</div></div>"
    )
    first, *others = (Elements(state).found for state in states)
    assert all(other == first for other in others)
    waits = [cards.start_panel(), cards.stopped_panel("a"), cards.race_panel(Waiting(2))]
    first, *others = (Elements(state).found for state in waits)
    assert all(other == first for other in others)


def test_what_the_states_say() -> None:
    assert "Another race is running: 1 race before you." in cards.race_panel(Waiting(1))
    assert "3 races before you" in cards.race_panel(Waiting(3))
    preparing = cards.race_panel(Preparing(f"Making {HOSTILE}", 3, 12))
    assert 'value="25"' in preparing and "&lt;img" in preparing
    assert 'role="alert"' in cards.failed_panel("a") and "alert" not in cards.stopped_panel("a")
    running = cards.race_panel(replace(FASTER, finished=False))
    assert "32 pictures for 8 skills: three ways take turns." in running
    assert "the ways take turns" in cards.race_panel(standing((1.0,), (1.0,), finished=False))


def test_the_notes_are_honest() -> None:
    html = cards.result_panel(FASTER, "<svg/>")
    assert "decide alike for all 32 pictures" in html
    assert "difference between two scores: 0.0000079, where the largest score is 17.5." in html
    assert "random weights of rank 64" in html
    assert "Medians of 3 rounds in turn, after a run of each to warm up, on A Processor" in html
    assert "with 2 threads for each" in html and "Separate models 117 ms to 119 ms" in html
    assert "took part" not in html and "too long" not in html

    short = replace(FASTER, own_skills=50, asked=8, threads=1, agreement=Agreement(17.46, 0.5, 31))
    html = cards.result_panel(short, "<svg/>")
    assert 'class="note bad"' in html and "alike for 31 of 32 pictures" in html
    assert "8 pictures for each skill would take too long" in html
    assert "8 of your 50 skills took part" in html and "with 1 thread for each" in html


def test_no_text_becomes_markup() -> None:
    hostile = replace(
        standing((0.1,), (0.2,)), skills=(HOSTILE, "b"), processor=HOSTILE, finished=True
    )
    picture = race_picture(hostile, DAY)
    html = cards.result_panel(hostile, picture) + cards.failed_panel(HOSTILE)
    images = re.findall(r"<img [^>]*>", html)
    assert len(images) == 1 and 'src="data:image/svg+xml;base64,' in images[0]
    assert "<img" not in picture


@pytest.mark.parametrize("race", [FASTER, SLOWER, standing((0.1,), (0.3,)), standing((0.1,))])
def test_the_picture_to_share(race: Standing) -> None:
    svg = race_picture(race, DAY)
    root = ElementTree.fromstring(svg)
    assert (root.get("width"), root.get("height")) == (str(WIDTH), str(HEIGHT)) == ("1200", "630")
    texts = [str(text.text) for text in root.findall(".//{*}text")]
    assert texts[0] == headline(race)
    assert "A Processor · 2 threads each · 09 March 2026" in texts
    assert texts[-1].startswith("aoft-deploy ")
    present = [lane for lane in race.lanes if not lane.absent]
    widths = [float(str(bar.get("width"))) for bar in root.findall(".//{*}rect") if bar.get("rx")]
    seconds = [lane.laps.median for lane in present]
    weights = [lane.weights for lane in present]
    for lengths, values in ((widths[: len(present)], seconds), (widths[len(present) :], weights)):
        scaled = [max(lengths) * value / max(values) for value in values]
        assert lengths == pytest.approx(scaled, abs=0.06)
    for text in root.findall(".//{*}text"):  # a letter of a wide font takes 0.62 em
        wide = 0.62 * float(str(text.get("font-size"))) * len(str(text.text))
        assert text.get("text-anchor") == "end" or float(str(text.get("x"))) + wide < WIDTH
    html = cards.result_panel(race, svg)
    data = re.findall(r"base64,([\w+/=]+)", html)[0]
    assert base64.b64decode(data).decode() == svg
