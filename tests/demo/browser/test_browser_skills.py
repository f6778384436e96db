"""The view Skills in a real browser."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from browser_support import PICTURE, TASKS
from demo_page import DemoPage

from aoft_demo.tasks.shared_fleet import BUNDLED
from aoft_deploy.checkpoints.opening import load

pytestmark = pytest.mark.slow


def test_swapping(open_page: Callable[..., DemoPage], tmp_path: Path) -> None:
    page, other = open_page(), open_page()
    page.tab("Skills")
    rows = page.find("#resident tbody tr")
    page.expect(rows).to_have_count(len(TASKS))
    checkpoint = tmp_path / "model.ckpt"
    shutil.copyfile(BUNDLED / "digits.ckpt", checkpoint)
    page.upload("#upload", checkpoint)
    page.see("#upload .file-preview")
    page.fill("#name", "my digits")
    page.click("#add")
    page.shows("#verdict", "my digits joined the fleet with 10 classes")
    page.expect(rows).to_have_count(len(TASKS) + 1)
    parameters = sum(p.numel() for p in load(checkpoint).trained().values())
    row = page.find("#resident [data-task='my digits']")
    assert int(row.get_attribute("data-bytes")) == 4 * parameters
    page.choose("#verify-name", "my digits")
    page.click("#verify")
    page.shows("#verdict", "my digits gives the same answers")
    figures = page.find("#verdict td").all_inner_texts()
    merged, fleet, largest = (float(figures[i]) for i in (1, 3, 5))
    assert 0 < merged < 1e-4 * largest and 0 < fleet < 1e-4 * largest
    assert figures[7] == "16 of 16 pictures"
    page.choose("#remove-name", "my digits")
    page.tab("Ask")
    answers = page.classify(PICTURE)
    assert answers["my digits"] == answers["digits"]
    other.playwright.reload()
    other.ready()
    other.shows("#head", f"{len(TASKS)} tasks")
    page.tab("Skills")
    page.click("#remove")
    page.shows("#verdict", "my digits was removed")
    page.expect(rows).to_have_count(len(TASKS))


DROPDOWNS = (
    ("Skills", "#remove-name"),
    ("Skills", "#verify-name"),
    ("How it works", "#inside-task"),
    ("Take home", "#export-task"),
)


def test_each_dropdown_keeps_its_choice_while_tasks_come_and_go(
    open_page: Callable[..., DemoPage], tmp_path: Path
) -> None:
    page = open_page()

    def chosen_are(*names: str) -> None:
        for (tab, selector), name in zip(DROPDOWNS, names, strict=True):
            page.tab(tab)
            page.expect(page.find(f"{selector} input")).to_have_value(name)
        page.tab("Skills")

    chosen_are(*[TASKS[0]] * 4)
    for tab, selector, name in (
        ("How it works", "#inside-task", "digits"),
        ("Take home", "#export-task", "shape"),
        ("Skills", "#verify-name", "orientation"),
        ("Skills", "#remove-name", "count"),
    ):
        page.tab(tab)
        page.choose(selector, name)
    shutil.copyfile(BUNDLED / "shape.ckpt", tmp_path / "one more.ckpt")
    page.upload("#upload", tmp_path / "one more.ckpt")
    page.see("#upload .file-preview")
    page.click("#add")
    page.shows("#head", f"{len(TASKS) + 1} tasks")
    chosen_are("count", "orientation", "digits", "shape")
    page.click("#remove")
    page.shows("#verdict", "count was removed")
    page.shows("#head", f"{len(TASKS)} tasks")
    chosen_are("", "orientation", "digits", "shape")
    page.click("#remove")  # a second click must not remove another task
    page.shows("#verdict [role=alert]", "Choose a task to remove first.")
    page.choose("#remove-name", "digits")
    page.click("#remove")
    page.shows("#verdict", "digits was removed")
    chosen_are("", "orientation", "", "shape")
    page.tab("How it works")
    page.click("#look")
    page.shows("#inside [role=alert]", "Choose a task to look into first.")
    page.playwright.reload()  # a new session with all initial tasks
    page.ready()
    page.shows("#head", f"{len(TASKS)} tasks")
    chosen_are(*[TASKS[0]] * 4)
