"""The view Skills in a real browser: switch, add, remove, undo and prove."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser_support import PICTURES, TASKS, violations
from demo_page import DemoPage

from aoft_demo.tasks.shared_fleet import bundled_checkpoints
from aoft_deploy.checkpoints.checkpoint import read_checkpoint
from aoft_deploy.checkpoints.opening import load
from aoft_deploy.data.images import read_image
from aoft_deploy.tuning.merging import merge

pytestmark = pytest.mark.slow

CHECKPOINT = bundled_checkpoints()[0]


def names(page: DemoPage) -> list[str]:
    """The names of the rows."""
    return [row.get_attribute("data-task") for row in page.find("#rows li").all()]


def test_skills_are_switched_added_removed_and_brought_back(
    open_page: Callable[..., DemoPage], tmp_path: Path
) -> None:
    page, other = open_page(), open_page(color_scheme="dark")
    page.tab("Skills")
    rows = page.find("#rows li")
    page.expect(rows).to_have_count(len(TASKS))
    assert names(page) == TASKS
    first, second = TASKS[:2]
    switch = page.find(f"#rows [data-task='{first}'] [role=switch]")
    switch.focus()
    page.playwright.keyboard.press("Space")
    page.expect(page.find("#answers .card")).to_have_count(len(TASKS) - 1)
    page.expect(switch).to_have_attribute("aria-checked", "false")

    folder = tmp_path / "pets"
    folder.mkdir()
    for name in (f"{first}.ckpt", "<b>my pets.ckpt"):
        shutil.copyfile(CHECKPOINT, folder / name)
    (folder / "broken.ckpt").write_bytes(b"no checkpoint")
    page.upload("#rows", *sorted(folder.iterdir()))
    page.shows("#said [role=alert]", "broken.ckpt is no checkpoint")
    page.shows("#said", f"{first} 2 joined the fleet with")
    page.expect(rows).to_have_count(len(TASKS) + 2)
    added = f"{first} 2"
    parameters = sum(p.numel() for p in load(CHECKPOINT).trained().values())
    row = page.find(f"#rows [data-task='{added}']")
    assert int(row.get_attribute("data-bytes")) == 4 * parameters
    page.shows("#head", f"{len(TASKS) + 2} skills")

    page.playwright.get_by_label(f"Remove {second}").click()
    page.shows("#rows .undo", f"{second} was removed")
    page.playwright.get_by_label(f"Remove {added}").click()
    page.shows("#rows .undo", f"{added} was removed")
    page.expect(rows).to_have_count(len(TASKS))
    undo = page.playwright.get_by_role("button", name="Undo")
    undo.click()
    page.expect(page.find(f"#rows [data-task='{added}']")).to_have_count(1)
    page.shows("#rows .undo", f"{second} was removed")
    undo.click()
    page.expect(page.find(f"#rows [data-task='{second}']")).to_have_count(1)
    page.expect(undo).to_have_count(0)
    assert names(page) == ["b my pets", added, *TASKS]  # the visitor's own come first
    page.upload("#rows", *[folder / f"{first}.ckpt"] * 17)
    page.shows("#rows .sending", "Add at most 16 files at once: these are 17.")
    page.tab("Ask")
    answers = page.classify(PICTURES[1])
    assert set(answers) == {*TASKS[1:], "b my pets", added}
    assert answers[added] == answers["b my pets"]

    other.playwright.reload()  # another visitor
    other.ready()
    other.tab("Skills")
    assert names(other) == TASKS
    for page_of_theirs in (page, other):
        page_of_theirs.tab("Skills")
        assert violations(page_of_theirs) == []


def test_the_proof_shows_what_the_library_computes(open_page: Callable[..., DemoPage]) -> None:
    import torch

    page = open_page(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    page.classify(PICTURES[1])
    page.tab("Skills")
    name = TASKS[0]
    page.find(f"#rows [data-task='{name}'] [data-act=proved]").tap()
    page.see("#proof .scale")
    page.shows("#proof", "The answers are the same")
    page.shows("#proof", "17 of 17 pictures")
    tuned, checkpoint = load(CHECKPOINT).eval(), read_checkpoint(CHECKPOINT)
    pixels = torch.from_numpy(checkpoint.preprocessing(read_image(PICTURES[1]))[None])
    with torch.inference_mode():
        unmerged, merged = tuned(pixels)[0], merge(tuned).eval()(pixels)[0]
    for line in page.find("#proof tbody tr").all():
        index = checkpoint.classes.index(line.locator("th").inner_text())
        values = [float(cell.get_attribute("data-value")) for cell in line.locator("td").all()]
        expected = [float(unmerged[index]), float(merged[index]), float(unmerged[index])]
        assert values == pytest.approx(expected, abs=2e-4)
    marks = {
        mark.get_attribute("data-mark"): float(mark.get_attribute("data-value"))
        for mark in page.find("#proof [data-mark]").all()
    }
    assert 0 < marks["merged"] < marks["tolerance"] and 0 < marks["fleet"] < marks["tolerance"]
    assert marks["step"] < marks["tolerance"] < marks["largest"]
    assert page.playwright.evaluate("document.documentElement.scrollWidth") == 390
    frame = page.find("#proof").bounding_box()
    parts = [page.find("#proof table"), *page.find("#proof .scale > *").all()]
    below = 0.0
    for box in (part.bounding_box() for part in parts):
        assert box["y"] >= below - 1  # each has a line of its own
        assert frame["x"] <= box["x"] and box["x"] + box["width"] <= frame["x"] + frame["width"]
        below = box["y"] + box["height"]
    assert violations(page) == []
    for button in page.find("#rows button:visible").all():
        assert button.bounding_box()["height"] >= 24


def test_a_click_while_the_server_is_busy_is_not_lost(open_page: Callable[..., DemoPage]) -> None:
    page = open_page()
    page.tab("Skills")
    switches = page.find("#rows [role=switch]")
    page.expect(switches).to_have_count(len(TASKS))
    held: list[Any] = []
    delayed = set(TASKS)

    def hold(route: Any) -> None:
        clicked = route.request.post_data_json.get("event_data") or {}
        if clicked.get("name") in delayed:
            held.append(route)
        else:
            route.continue_()

    def release() -> None:
        delayed.clear()
        for route in held:
            route.continue_()
        held.clear()

    page.playwright.route("**/queue/join*", hold)  # delay the second switch's way to the server
    switches.nth(0).click()
    switches.nth(1).click()
    page.playwright.wait_for_timeout(500)
    release()
    page.expect(page.find("#answers .card")).to_have_count(len(TASKS) - 2)
    page.expect(page.find("#rows [role=switch][aria-checked=false]")).to_have_count(2)

    delayed.add(TASKS[3])
    switches.nth(2).click()
    switches.nth(3).click()  # the server does not know this click when it answers the one before
    page.expect(page.find("#answers .card")).to_have_count(len(TASKS) - 3)
    page.playwright.wait_for_timeout(500)  # the rows have come with the answers
    page.expect(switches.nth(3)).to_have_attribute("aria-checked", "false")
    release()
    page.expect(page.find("#answers .card")).to_have_count(len(TASKS) - 4)
    page.expect(page.find("#rows [role=switch][aria-checked=false]")).to_have_count(4)
