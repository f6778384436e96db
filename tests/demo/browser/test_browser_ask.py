"""The view Ask in a real browser: the first screen, pictures, and the answers."""

from __future__ import annotations

import math
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser_support import PICTURES, TASKS, bundled_fleet, library_answers, violations
from demo_page import DemoPage

from aoft_demo.tasks.shared_fleet import open_shared_fleet
from aoft_demo.tasks.skills import bundled_examples, bundled_skills
from aoft_demo.views.ask.view import REMOVE_OLD_ANSWERS
from aoft_demo.views.units import decimal, size
from aoft_deploy.artefacts.manifest import manifest_path, read_manifest
from aoft_deploy.data.images import read_image

pytestmark = pytest.mark.slow

SIZE = "[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"


def assert_is_the_librarys(answers: dict[str, dict[str, float]], picture: Path) -> None:
    """Every skill's probabilities on the page are those that the library computes."""
    assert set(answers) == set(TASKS)
    for task in TASKS:
        assert answers[task] == pytest.approx(library_answers(task, picture), abs=2e-5), task


def test_the_first_screen_shows_answers_and_their_proofs(
    open_page: Callable[..., DemoPage], tmp_path: Path
) -> None:
    page = open_page()
    assert page.playwright.evaluate(SIZE) == [1280, 800]
    first = bundled_examples()[0]
    assert_is_the_librarys(page.answers(), first.file)
    captions = page.find("#picture .examples span").all_inner_texts()
    assert captions == [example.caption for example in bundled_examples()]
    for image in page.find("#picture img").all():
        page.expect(image).to_have_js_property("complete", True)
        assert image.evaluate("e => e.naturalWidth") > 0
    shared = open_shared_fleet([], tmp_path, threads=1)
    page.shows("#head", f"{len(TASKS)} skills")
    page.shows("#head", f"share one {size(shared.backbone_bytes)} model")
    shown = page.find("#answers .cards").first
    assert shown.evaluate("all => all.scrollHeight <= all.clientHeight")  # without scrolling
    page.click("#answers .group > summary")  # the skills that the picture does not fit
    for name, skill in bundled_skills().items():
        card = page.find(f"#answers [data-task='{name}']")
        page.expect(card.locator("h2")).to_have_text(skill.question)
        shown = card.inner_text()
        assert skill.made_for in shown
        assert f"right on {math.floor(100 * skill.accuracy + 1e-9)}%" in shown
        label, best = max(library_answers(name, first.file).items(), key=lambda pair: pair[1])
        assert card.locator(".top").inner_text() == (
            label if best >= skill.threshold else "Not sure"
        )
    difference = read_manifest(manifest_path(bundled_fleet()))["verification"]["max_abs"]
    page.shows("#answers .strip", f"merged = unmerged ± {decimal(difference, 1)}")
    page.click("#answers .strip a >> nth=2")
    page.see("#proof .scale")
    page.shows("#proof", "The answers are the same")
    assert page.playwright.url.endswith("#prove")
    page.playwright.go_back()
    page.see("#answers .card")


def test_uploaded_chosen_and_photographed_pictures_are_answered(
    open_page: Callable[..., DemoPage], tmp_path: Path
) -> None:
    page = open_page(permissions=["camera", "clipboard-read", "clipboard-write"])
    assert_is_the_librarys(page.classify(PICTURES[1]), PICTURES[1])
    page.find("[data-example='2']").focus()
    page.playwright.keyboard.press("Enter")
    assert_is_the_librarys(page.answered(), bundled_examples()[2].file)
    page.expect(page.find("[data-example='2']")).to_have_attribute("aria-pressed", "true")

    page.playwright.get_by_role("button", name="Camera").click()
    page.playwright.wait_for_function("document.querySelector('#picture video').readyState === 4")
    page.playwright.get_by_role("button", name="Take the picture").click()
    page.expect(page.find("#picture video")).to_be_hidden()
    page.expect(page.find("#picture .stage")).not_to_have_attribute("data-picture", "example-2")
    answers = page.answered()
    photo = page.context.request.get(page.find("#picture .shown").evaluate("e => e.src"))
    (tmp_path / "photo").write_bytes(photo.body())
    image = read_image(tmp_path / "photo")
    shown = page.find("#answers .strip").get_attribute("data-pixels")
    assert shown == f"{image.width} × {image.height} pixels"
    assert_is_the_librarys(answers, tmp_path / "photo")

    page.playwright.evaluate(
        """async () => {
            const picture = await (await fetch("aoft/example/1")).blob();
            const canvas = document.createElement("canvas");
            const bitmap = await createImageBitmap(picture);
            [canvas.width, canvas.height] = [bitmap.width, bitmap.height];
            canvas.getContext("2d").drawImage(bitmap, 0, 0);
            const png = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
            await navigator.clipboard.write([new ClipboardItem({ "image/png": png })]);
        }"""
    )
    before = page.find("#picture .stage").get_attribute("data-picture")
    page.playwright.get_by_role("button", name="Paste").click()
    page.expect(page.find("#picture .stage")).not_to_have_attribute("data-picture", before)
    pasted = page.answered()
    assert set(pasted) == set(TASKS) and pasted != answers


def test_the_page_fits_a_desktop_window_and_a_phone(
    open_page: Callable[..., DemoPage], tmp_path: Path
) -> None:
    pictures = os.environ.get("AOFT_SCREENSHOTS")  # set it to docs/assets to update them
    folder = Path(pictures) if pictures else tmp_path
    for scheme in ("light", "dark"):
        page = open_page(color_scheme=scheme)
        page.find("[data-example='5']").click()
        page.answered()
        assert page.playwright.evaluate(SIZE) == [1280, 800]
        ink = page.find(".card .top").first.evaluate("e => getComputedStyle(e).color")
        (red,) = re.findall(r"rgb\((\d+)", ink)
        assert (int(red) > 128) is (scheme == "dark")
        assert violations(page) == []
        page.playwright.mouse.move(640, 790)
        page.playwright.screenshot(path=folder / f"demo-{scheme}.png")
    phone = {"width": 390, "height": 844}
    page = open_page(viewport=phone, is_mobile=True, has_touch=True)
    page.find("[data-example='5']").click()
    page.answered()
    assert page.playwright.evaluate(SIZE)[0] == 390
    page.playwright.screenshot(path=folder / "demo-phone.png")
    card = page.find("#answers .card").first.bounding_box()
    assert card["width"] > 250 and card["y"] + card["height"] < 844  # without scrolling
    for button in page.find("#picture button:visible, #answers summary:visible").all():
        assert button.bounding_box()["height"] >= 24
    assert violations(page) == []


def test_answers_disappear_with_their_picture(open_page: Callable[..., DemoPage]) -> None:
    page = open_page()
    page.classify(PICTURES[0])
    held: list[Any] = []
    released = threading.Event()

    def hold(route: Any) -> None:
        if released.is_set():
            route.continue_()
        else:
            held.append(route)

    page.playwright.route("**/queue/join*", hold)  # delay the requests to the server
    page.upload("#picture", PICTURES[1])
    page.shows("#answers", "Asking all skills")
    page.expect(page.find("#answers .card")).to_have_count(0)
    released.set()
    for route in held:
        route.continue_()
    assert_is_the_librarys(page.answered(), PICTURES[1])

    def shown(picture: str | None, html: str) -> str:
        value = None if picture is None else {"path": f"/tmp/x/uploads/{picture}/a.png"}
        return str(
            page.playwright.evaluate(
                f"([picture, html]) => ({REMOVE_OLD_ANSWERS})(picture, html)", [value, html]
            )
        )

    of_one, error = '<div data-picture="one">cards</div>', '<div role="alert">error</div>'
    assert shown("one", of_one) == of_one
    assert "Asking all skills" in shown("two", of_one)
    assert "Choose a picture" in shown(None, of_one)
    start = shown(None, of_one)
    assert shown(None, start) == start and "Asking" in shown("one", start)
    busy = shown("two", of_one)
    assert shown("two", busy) == busy and shown("two", error) == error
