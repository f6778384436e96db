"""The view Race in a real browser: a whole race, its numbers, and two visitors."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from browser_support import TASKS, take_picture, violations
from demo_page import DemoPage
from PIL import Image
from running_demo import Demo, DemoClient, uploaded_file

from aoft_demo.actions.race import MAX_SKILLS
from aoft_demo.tasks.shared_fleet import BUNDLED
from aoft_deploy.checkpoints.opening import load
from aoft_deploy.tuning.merging import merge

pytestmark = pytest.mark.slow

SKILLS = min(len(TASKS), MAX_SKILLS)


def state(page: DemoPage, name: str) -> None:
    """Wait until the race is in a state."""
    page.see(f"#race .race[data-state={name}]")


def figures(page: DemoPage, section: str) -> dict[str, tuple[str, str, float]]:
    """Value, factor and length in percent of each bar of a section."""
    lanes = page.find(f"#race section[aria-label^='{section}'] .lane").all()
    return {
        lane.get_attribute("data-lane"): (
            lane.locator(".figure b").inner_text(),
            lane.locator(".figure small").text_content(),
            float(lane.locator(".track i").evaluate("bar => parseFloat(bar.style.width)")),
        )
        for lane in lanes
    }


def number(text: str) -> float:
    """The number at the start of a text, in ms or MB."""
    value, unit = text.split()
    return float(value) * {"ms": 1, "s": 1000, "MB": 1, "GB": 1000}[unit]


def test_a_race_and_its_picture(open_page: Callable[..., DemoPage], tmp_path: Path) -> None:
    page = open_page()
    page.tab("Race")
    page.shows("#race", "Which way answers fastest?")
    page.expect(page.find("#race-stop")).not_to_be_visible()
    page.playwright.get_by_role("radio", name="1", exact=True).check()
    page.find("#race-start").press("Enter")
    state(page, "running")
    page.expect(page.find("#race-stop")).to_be_visible()
    page.shows("#race", "Racing")
    state(page, "done")

    headline = page.find("#race h2").inner_text()
    sentence = page.find("#race .said").inner_text()
    pictures = f"{SKILLS} pictures, each for another skill: one pass took"
    assert sentence.startswith(pictures)
    seconds, memory = figures(page, "Time"), figures(page, "Memory")
    assert list(seconds) == list(memory) == ["mixed", "separate", "peft"]
    for value, factor, _ in seconds.values():
        assert value in sentence and factor in sentence
    ratio = number(seconds["separate"][0]) / number(seconds["mixed"][0])
    assert float(seconds["separate"][1].removesuffix(" ×")) == pytest.approx(ratio, rel=0.06)
    if "as fast as" in headline:
        assert seconds["separate"][1] in headline

    # The memory is that of the library's own models.
    models = [load(BUNDLED / f"{task}.ckpt") for task in TASKS[:SKILLS]]
    merged = sum(4 * p.numel() for model in models for p in merge(model).parameters()) / 1e6
    assert number(memory["separate"][0]) == pytest.approx(merged, rel=0.02)
    assert number(memory["mixed"][0]) < 1.2 * merged / SKILLS
    times = float(memory["separate"][1].removesuffix(" ×"))
    assert times == pytest.approx(merged / number(memory["mixed"][0]), rel=0.02)
    for name, (value, _, length) in memory.items():
        assert length == pytest.approx(100 * number(value) / number(memory["separate"][0]), abs=0.6)
        assert name == "separate" or length < 100
    page.shows("#race .notes", f"decide alike for all {SKILLS} pictures")
    page.shows("#race .notes", re.compile(r"Medians of \d+ rounds in turn.*with 1 thread for each"))

    with page.playwright.expect_download() as download:
        page.find("#race .save").press("Enter")
    download.value.save_as(tmp_path / "race.png")
    with Image.open(tmp_path / "race.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (1200, 630))
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**20) or []}
    assert {(255, 255, 255), (15, 118, 110), (148, 163, 184)} <= colours

    page.playwright.wait_for_timeout(1500)  # the bars have grown
    take_picture(page, "demo-race.png")
    page.playwright.get_by_text("Show code").last.click()
    for dark in (False, True):
        page.playwright.evaluate(f"document.body.classList.toggle('dark', {str(dark).lower()})")
        page.playwright.wait_for_timeout(500)  # the colours change slowly
        assert not violations(page, ["#race", "#race-code"])

    page.playwright.set_viewport_size({"width": 390, "height": 844})
    page.playwright.evaluate("scrollTo(0, 0)")
    last = page.find("#race section[aria-label^=Time] .lane").last.bounding_box()
    assert last["y"] + last["height"] < 844
    assert page.playwright.evaluate("document.documentElement.scrollWidth") == 390
    for button in ("#race-start", "#race .save"):
        assert page.find(button).bounding_box()["height"] >= 40


def test_a_second_visitor_waits_and_a_race_stops_at_once(
    open_page: Callable[..., DemoPage], demo: Demo
) -> None:
    first, second = open_page(), open_page(viewport={"width": 390, "height": 844})
    for page in (first, second):
        page.tab("Race")
    first.click("#race-start")
    state(first, "running")
    second.click("#race-start")
    second.shows("#race", "Another race is running: 1 race before you.")
    second.click("#race-stop")
    second.shows("#race", "You stopped the race.")
    second.expect(second.find("#race-stop")).not_to_be_visible()
    assert second.playwright.evaluate("document.activeElement.id") == "race-start"
    second.click("#race-start")
    second.shows("#race", "1 race before you")
    first.click("#race-stop")
    first.shows("#race", "You stopped the race.")
    second.shows("#race", re.compile("Getting ready|Racing"))  # it starts when the first has ended
    second.click("#race-stop")
    second.shows("#race", "You stopped the race.")


def test_hostile_requests_start_no_race(demo: Demo, tmp_path: Path) -> None:
    client = DemoClient(demo, tmp_path, tmp_path, tmp_path / "none")
    for count in (10**9, -1, "4", [4], {"a": 1}):
        answer = client.call("race-start", "click", count, None)
        assert not answer.success or 'data-state=\\"failed' in answer.text, count
    for path in ("/etc/passwd", str(BUNDLED / f"{TASKS[0]}.ckpt"), "../../etc/passwd"):
        answer = client.call("race-start", "click", 1, uploaded_file(path))
        assert not answer.success and "root:" not in answer.text, path
