"""The view Ask in a real browser."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser_support import PICTURE, TASKS, library_answers
from demo_page import DemoPage

from aoft_demo.tasks.shared_fleet import BUNDLED
from aoft_demo.views.ask.view import REMOVE_OLD_ANSWERS
from aoft_deploy.data.images import read_image

pytestmark = pytest.mark.slow


def test_classifying(open_page: Callable[..., DemoPage]) -> None:
    page = open_page()
    answers = page.classify(PICTURE)
    assert set(answers) == set(TASKS)
    for task in TASKS:
        expected = library_answers(task, PICTURE)
        assert answers[task] == pytest.approx(expected, abs=2e-5)
    page.shows("#answers .facts", re.compile(r"one pass, \d tasks.*per task.*to switch tasks"))
    page.playwright.get_by_label("count", exact=True).uncheck()
    page.expect(page.find("#answers .card")).to_have_count(len(TASKS) - 1)
    thumbnails = page.find("#examples .thumbnail-item")
    assert thumbnails.count() == len(list(BUNDLED.glob("*.png")))
    for image in page.find("#examples img").all():
        page.expect(image).to_have_js_property("complete", True)
        assert image.evaluate("e => e.naturalWidth") > 0
    thumbnails.first.click()
    page.shows("[data-task=colour] .top", "green")
    expected = library_answers("colour", sorted(BUNDLED.glob("*.png"))[0])
    assert page.answers()["colour"] == pytest.approx(expected, abs=2e-5)
    page.find("#tasks input").first.focus()
    page.playwright.keyboard.press("Space")  # choose all, then none
    page.expect(page.find("#answers .card")).to_have_count(len(TASKS))
    page.playwright.keyboard.press("Space")
    page.shows("#answers", "No task is chosen")


def test_classifying_a_webcam_picture(open_page: Callable[..., DemoPage], tmp_path: Path) -> None:
    page = open_page(permissions=["camera"])
    page.playwright.get_by_label("Capture from camera").click()
    page.playwright.get_by_text("Click to Access Webcam").click()
    page.see("#picture video")
    page.playwright.wait_for_function("document.querySelector('#picture video').readyState === 4")
    page.playwright.get_by_label("capture photo").click()
    page.see("#answers .card")
    photo = page.context.request.get(page.see("#picture img").get_attribute("src"))
    (tmp_path / "photo").write_bytes(photo.body())
    image = read_image(tmp_path / "photo")
    page.shows("#answers .facts", f"{image.width} × {image.height} pixels")
    answers = page.answers()
    assert set(answers) == set(TASKS)
    for task in TASKS:
        assert answers[task] == pytest.approx(library_answers(task, tmp_path / "photo"), abs=2e-5)


def test_the_page_fits_a_desktop_window_and_the_width_of_a_phone(
    open_page: Callable[..., DemoPage], tmp_path: Path
) -> None:
    pictures = os.environ.get("AOFT_SCREENSHOTS")  # set it to docs to update the screenshots
    folder = Path(pictures) if pictures else tmp_path
    size = "[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
    for scheme in ("light", "dark"):
        page = open_page(color_scheme=scheme)
        page.classify(BUNDLED / "colour-green.png")
        assert page.playwright.evaluate(size) == [1280, 800]
        ink = page.find(".card .top").first.evaluate("e => getComputedStyle(e).color")
        (red,) = re.findall(r"rgb\((\d+)", ink)
        assert (int(red) > 128) is (scheme == "dark")
        page.playwright.mouse.move(640, 790)
        page.playwright.screenshot(path=folder / f"demo-{scheme}.png")
    page = open_page(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    page.classify(BUNDLED / "colour-green.png")
    assert page.playwright.evaluate(size)[0] == 390
    page.playwright.screenshot(path=folder / "demo-phone.png", full_page=True)
    assert page.find("#answers .card").first.bounding_box()["width"] > 250


def test_answers_disappear_with_their_picture(open_page: Callable[..., DemoPage]) -> None:
    page = open_page()
    page.classify(PICTURE)
    held: list[Any] = []
    released = threading.Event()

    def hold(route: Any) -> None:
        if released.is_set():
            route.continue_()
        else:
            held.append(route)

    page.playwright.route("**/queue/join*", hold)  # delay the requests to the server
    page.upload("#picture", BUNDLED / "colour-red.png")
    page.shows("#answers", "Classifying the picture")
    page.expect(page.find("#answers .card")).to_have_count(0)
    released.set()
    for route in held:
        route.continue_()
    page.shows("[data-task=colour] .top", "red")
    assert page.answers()["colour"] == pytest.approx(
        library_answers("colour", BUNDLED / "colour-red.png"), abs=2e-5
    )

    page.tab("How it works")
    page.click("#look")
    page.see("#inside .chart")
    page.see("#attention img")
    page.shows("#inside", f"Inside {TASKS[0]}")
    page.tab("Ask")
    page.classify(PICTURE)
    page.tab("How it works")
    page.expect(page.find("#attention img")).to_have_count(0)
    page.see("#inside .chart")
    page.choose("#inside-task", "digits")
    page.shows("#inside", "No task analysed yet")


def test_a_late_answer_is_not_shown_with_another_picture(
    open_page: Callable[..., DemoPage],
) -> None:
    page = open_page()

    def shown(picture: str | None, html: str) -> str:
        value = None if picture is None else {"path": f"/tmp/x/uploads/{picture}/a.png"}
        return str(
            page.playwright.evaluate(
                f"([picture, html]) => ({REMOVE_OLD_ANSWERS})(picture, html)", [value, html]
            )
        )

    of_one, error = '<div data-picture="one">cards</div>', '<div role="alert">error</div>'
    assert shown("one", of_one) == of_one
    assert "Classifying the picture" in shown("two", of_one)
    assert "Drop a picture" in shown(None, of_one)
    start = shown(None, of_one)
    assert shown(None, start) == start and "Classifying" in shown("one", start)
    busy = shown("two", of_one)
    assert shown("two", busy) == busy and shown("two", error) == error
