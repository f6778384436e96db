"""The view Teach in a real browser."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser_support import PICTURE, TASKS, TRAINING, take_picture, violations
from demo_page import WAIT, DemoPage
from PIL import Image
from running_demo import Demo, DemoClient
from teaching import shades, taught_classes

from aoft_deploy.checkpoints.checkpoint import read_checkpoint
from aoft_deploy.checkpoints.opening import load
from aoft_deploy.data.images import read_image

psutil: Any = importlib.import_module("psutil")  # its types are partial

pytestmark = pytest.mark.slow

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


def tile(page: DemoPage, number: int) -> Any:
    return page.find("#teach-tiles .tile").nth(number)


def press(part: Any, name: str) -> None:
    part.get_by_role("button", name=name, exact=True).click()


def draw(page: DemoPage, canvas: Any, number: int = 0) -> None:
    """Draw a line; each number gives another one."""
    canvas.scroll_into_view_if_needed()
    box, mouse = canvas.bounding_box(), page.playwright.mouse
    mouse.move(box["x"] + 20 + 8 * number, box["y"] + 20)
    mouse.down()
    mouse.move(box["x"] + 130 - 8 * number, box["y"] + 130, steps=3)
    mouse.up()


def library_answers(checkpoint: Path, picture: Path) -> dict[str, float]:
    """Probabilities of the unmerged model, computed by the library."""
    import torch

    tuned, found = load(checkpoint).eval(), read_checkpoint(checkpoint)
    with torch.inference_mode():
        pixels = torch.from_numpy(found.preprocessing(read_image(picture))[None])
        return dict(found.classes.answers(tuned(pixels).numpy(), 4)[0])


def shown_answers(page: DemoPage) -> dict[str, float]:
    """The probabilities of the trial."""
    rows = page.find("#teach-trial .line").all()
    return {r.get_attribute("data-label"): float(r.get_attribute("data-p")) for r in rows}


@pytest.mark.parametrize("context", [{}, PHONE], ids=["desktop", "phone"])
def test_a_skill_is_taught_tried_and_downloaded(
    open_page: Callable[..., DemoPage], tmp_path: Path, context: dict[str, Any]
) -> None:
    page = open_page(**context)
    page.tab("Teach")
    camera, files = tile(page, 0), tile(page, 1)
    for part, name in ((camera, "a, b (c)"), (files, "dark")):
        part.get_by_role("textbox").fill(name)
    press(camera, "Camera")
    press(camera, "Record 3 seconds")
    page.expect(camera.locator(".strip li").nth(11)).to_be_attached(timeout=WAIT)
    hold = camera.get_by_role("button", name="Hold to record")
    before = camera.locator(".strip li").count()
    page.expect(camera.locator(".recording")).to_have_count(0, timeout=WAIT)
    hold.focus()
    page.playwright.keyboard.down("Enter")  # the camera by keyboard
    page.expect(camera.locator(".strip li").nth(before + 2)).to_be_attached(timeout=WAIT)
    page.playwright.keyboard.up("Enter")
    page.add_files(1, shades(tmp_path, 20, 12, side=64))
    press(page.find("#teach-tiles"), "+ Add a class")
    drawn = tile(page, 2)
    drawn.get_by_role("textbox").fill("line")
    press(drawn, "Draw")
    for number in range(12):
        draw(page, drawn.locator("canvas"), number)
        press(drawn, "Add drawing")
    page.expect(drawn).to_have_attribute("data-count", "12", timeout=WAIT)
    press(drawn, "Remove picture 12 of line")
    page.expect(drawn).to_have_attribute("data-count", "11")
    page.expect(drawn.locator(".count")).to_have_text(
        "11 pictures: 20 to 40 different ones work best"
    )
    assert (
        page.playwright.evaluate("document.documentElement.scrollWidth")
        <= (page.playwright.viewport_size["width"])
    )
    assert not violations(page, ["#teach"])

    page.fill("#train-name", "things")
    page.click("#train")
    page.playwright.wait_for_selector("#curve .running .chart", timeout=TRAINING)
    page.expect(page.find("#stop")).to_be_visible()
    page.expect(page.find("#train")).to_be_hidden()
    page.shows("#curve .running h2", "Learning things: about ")
    page.shows("#curve .running", "Best so far: right on")
    page.expect(page.find("#curve .done")).to_be_visible(timeout=TRAINING)
    page.expect(page.find("#train")).to_be_visible()
    page.shows("#curve", "pictures that were not used for training")
    accuracy = float(page.find("#curve [data-accuracy]").get_attribute("data-accuracy"))
    with page.playwright.expect_download() as download:
        page.click("#trained")
    checkpoint = tmp_path / "things.ckpt"
    download.value.save_as(checkpoint)
    found = read_checkpoint(checkpoint)
    assert set(found.classes) == {"dark", "line", "a, b (c)"}
    assert found.training["test_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert found.training["images"] == 12 + 11 + int(camera.get_attribute("data-count")) - sum(
        2 * max(n // 6, 1) for n in (12, 11, int(camera.get_attribute("data-count")))
    )

    trial = page.find("#teach-trial")
    trial.locator("input[type=file]").set_input_files(str(tmp_path / "20-3.png"))
    page.see("#teach-trial .line")
    mine = shown_answers(page)
    assert mine == pytest.approx(library_answers(checkpoint, tmp_path / "20-3.png"), abs=2e-5)
    assert max(mine, key=lambda name: mine[name]) == "dark"
    press(trial, "Draw")
    draw(page, trial.locator("canvas"), 2)
    page.expect(trial.locator(".top")).to_have_text("line", timeout=WAIT)
    take_picture(page, "demo-teach.png")
    press(trial, "Camera")
    page.expect(trial.locator(".top")).to_have_text("a, b (c)", timeout=WAIT)
    assert not violations(page, ["#teach"])
    page.playwright.evaluate("document.body.classList.add('dark')")
    page.playwright.wait_for_timeout(500)  # Gradio's buttons change their colour slowly
    assert not violations(page, ["#teach"])

    page.tab("Ask")
    assert page.classify(tmp_path / "20-3.png")["things"] == pytest.approx(mine, abs=2e-5)
    page.expect(trial.locator("video")).to_have_count(0)  # the camera is off


def test_files_that_cannot_be_used_are_named_and_nothing_is_lost(
    open_page: Callable[..., DemoPage], tmp_path: Path
) -> None:
    page = open_page()
    page.tab("Teach")
    page.expect(tile(page, 0).locator(".count")).to_have_text("Needs at least 3 pictures")
    good = shades(tmp_path, 20, 2)
    Image.new("CMYK", (700, 500), (9, 99, 0, 0)).save(tmp_path / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    Image.new("RGB", (600, 300)).save(tmp_path / "turned.jpg", exif=exif)
    odd = {
        "text.png": (b"not a picture", "text.png"),
        "cut.png": (PICTURE.read_bytes()[:900], "cut.png"),
        "photo.heic": (b"\0\0\0\x18ftypheic" + bytes(200), "photo.heic is of the format HEIC"),
    }
    for name, (content, _) in odd.items():
        (tmp_path / name).write_bytes(content)
    some = [*good, tmp_path / "cmyk.jpg", tmp_path / "turned.jpg", *(tmp_path / n for n in odd)]
    tile(page, 0).locator("input[type=file]").set_input_files([str(file) for file in some])
    page.expect(tile(page, 0).locator(".problems li")).to_have_count(3, timeout=WAIT)
    page.expect(tile(page, 0)).to_have_attribute("data-count", "4", timeout=WAIT)
    problems = tile(page, 0).locator(".problems").inner_text()
    assert all(message.split(" ")[0] in problems for _, message in odd.values())
    assert "HEIC" in problems and "teach-" not in problems and "/" not in problems

    page.click("#train")
    page.shows("#curve [role=alert]", "A skill needs at least two classes: add pictures of each.")
    page.add_files(1, shades(tmp_path, 220, 2))
    page.expect(tile(page, 1).locator(".count")).to_have_text("2 pictures: 1 more needed")
    page.click("#train")
    page.shows("#curve [role=alert]", "Class 'Class 2' has 2 pictures, but must have 3 to 200")
    page.fill("#train-name", TASKS[0])
    page.add_files(1, shades(tmp_path, 120, 1))
    page.click("#train")
    page.shows("#curve [role=alert]", f"There is a task '{TASKS[0]}' already")
    page.fill("#train-name", "small")
    page.click("#train")
    page.expect(page.find("#curve .running h2")).to_be_visible(timeout=TRAINING)
    page.click("#stop")
    page.shows("#curve .empty:not(.bad)", "StoppedTraining was stopped; nothing was added.")
    counts = [tile(page, i).get_attribute("data-count") for i in (0, 1)]
    assert counts == ["4", "3"] and tile(page, 0).locator(".strip li").count() == 4


def training_traces(demo: Demo) -> list[str]:
    """Folders of the demo's trainings."""
    return [str(path) for path in demo.folder.glob("aoft-demo-*/session-*/training-*")]


def trainers(demo: Demo) -> list[Any]:
    """The demo's processes that train or wait for a training."""
    children = psutil.Process(demo.process.pid).children(recursive=True)
    return [child for child in children if "aoft_demo.trainer" in child.cmdline()]


def test_trainings_queue_and_closed_pages_do_not_block_the_queue(
    demo: Demo, open_page: Callable[..., DemoPage], tmp_path: Path
) -> None:
    first, second, third = open_page(), open_page(), open_page()
    for page in (first, second, third):
        page.tab("Teach")
        for number, shade in enumerate((20, 220)):
            page.add_files(number, shades(tmp_path, shade, 6))
    first.click("#train")
    first.shows("#curve .running", "Starting")
    for before, page in enumerate((second, third), 1):
        page.click("#train")
        page.shows("#curve .running h2", f"{before} training{'s' * (before > 1)} before yours")
    second.click("#stop")
    second.shows("#curve", "Training was stopped; nothing was added.")
    third.shows("#curve .running h2", "1 training before yours")
    first.playwright.wait_for_selector("#curve .running .chart", timeout=TRAINING)
    assert len(training_traces(demo)) == 1
    first.playwright.goto("about:blank")  # closes the page during its training
    third.playwright.wait_for_selector("#curve .running .chart", timeout=TRAINING)
    assert len(training_traces(demo)) == 1  # that of the third page
    third.click("#stop")
    third.shows("#curve", "Training was stopped; nothing was added.")
    assert training_traces(demo) == []
    assert len(trainers(demo)) <= 1  # the one that waits
    third.shows("#head", f"{len(TASKS)} skills")
    second.tab("Ask")
    assert set(second.classify(PICTURE)) == set(TASKS)


def test_a_visitor_is_answered_while_another_trains(demo: Demo, tmp_path: Path) -> None:
    teacher, visitor = (DemoClient(demo, tmp_path, tmp_path, tmp_path / "none") for _ in range(2))
    classes = taught_classes(teacher, 12)
    _, path = visitor.upload("a.png", PICTURE.read_bytes())
    assert visitor.classify(path).success
    waits: list[float] = []
    for message in teacher.fire("train", "click", "busy", classes):
        if "polyline" in str(message.get("output")) and len(waits) < 8:
            (process,) = (child for child in trainers(demo) if child.status() != "zombie")
            assert process.nice() > psutil.Process(demo.process.pid).nice()
            start = time.monotonic()
            answer = visitor.call("picture", "change", {"path": path})
            waits.append(time.monotonic() - start)
            assert answer.text.count("data-task") == len(TASKS)
    assert len(waits) == 8
    assert sorted(waits)[4] < 3, waits
