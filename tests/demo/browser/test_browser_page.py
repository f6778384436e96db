"""The whole page in a real browser: unusable uploads, and fifty tasks."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bombs import flat
from browser_support import PICTURE, TASKS, TRAINING, start
from demo_page import WAIT, DemoPage
from PIL import Image
from running_demo import Demo
from teaching import shades

from aoft_demo.tasks.shared_fleet import BUNDLED
from aoft_deploy.artefacts.engine import EngineOptions
from aoft_deploy.artefacts.prediction import load_classifier
from aoft_deploy.data.images import read_image

pytestmark = pytest.mark.slow


def test_unusable_uploads_are_reported_and_the_page_stays_usable(
    open_page: Callable[..., DemoPage], make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    page = open_page()
    pictures = {
        "text.png": (b"not a picture", "text.png"),
        "cut.png": (PICTURE.read_bytes()[:900], "cut.png"),
        "bomb.png": (flat(13_000, 13_000), "bomb.png"),
        "empty.png": (b"", "empty.png"),
    }
    for name, (content, message) in pictures.items():
        (tmp_path / name).write_bytes(content)
        page.upload("#picture", tmp_path / name)
        page.see("#answers [role=alert]")
        page.shows("#answers [role=alert]", message)
        assert str(tmp_path) not in page.find("#answers").inner_text()
        assert "/" not in page.find("#answers p").inner_text()
        page.clear()
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(100_000_000)
    page.upload("#picture", large)
    page.shows_message(re.compile("exceed the maximum allowed size.*large.png"))
    assert set(page.classify(PICTURE)) == set(TASKS)
    photograph = tmp_path / "photo.jpg"
    Image.open(PICTURE).convert("RGB").resize((8160, 6120)).save(photograph, quality=90)
    assert max(page.classify(photograph)["digits"].items(), key=lambda item: item[1])[0] == "7"
    page.shows("#answers .facts", "8160 × 6120 pixels")
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(200))
    page.clear()
    page.upload("#picture", tmp_path / "photo.heic")
    page.shows("#answers [role=alert]", "it is of the format HEIC: convert it to one of JPEG")

    page.tab("Skills")
    (tmp_path / "text.ckpt").write_bytes(b"no checkpoint")
    (tmp_path / "cut.ckpt").write_bytes((BUNDLED / "digits.ckpt").read_bytes()[:20_000])
    shutil.copyfile(make_checkpoint("aoft-lora-star"), tmp_path / "other.ckpt")
    for name, message in (
        ("text.ckpt", "text.ckpt is no checkpoint"),
        ("cut.ckpt", "cut.ckpt is no checkpoint"),
        ("other.ckpt", "other.ckpt was trained on backbone weights"),
    ):
        page.upload("#upload", tmp_path / name)
        page.see("#upload .file-preview")
        page.click("#add")
        page.shows("#verdict [role=alert]", message)
        page.find("#upload button[aria-label='Clear']").first.click()
    (tmp_path / "large.ckpt").write_bytes(b"")
    with (tmp_path / "large.ckpt").open("wb") as file:
        file.truncate(100_000_000)
    page.upload("#upload", tmp_path / "large.ckpt")
    page.shows_message(re.compile("exceed the maximum allowed size.*large.ckpt"))
    page.click("#add")
    page.shows("#verdict [role=alert]", "Choose a model.ckpt first")
    assert page.find("#resident tbody tr").count() == len(TASKS)
    page.tab("Teach")
    page.fill("#train-name", TASKS[0])
    page.click("#train")
    page.shows("#curve [role=alert]", f"There is a task '{TASKS[0]}'")
    page.tab("Ask")
    assert set(page.classify(BUNDLED / "colour-red.png")) == set(TASKS)


@pytest.mark.stress
def test_fifty_tasks_are_usable(
    demo: Demo, chrome: Any, installed: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    paths = [folder / f"task {i:02}.ckpt" for i in range(50 - len(TASKS))]
    for path in paths:
        shutil.copyfile(BUNDLED / "digits.ckpt", path)
    (fleet,) = Path(os.environ["AOFT_CACHE_DIR"], "demo").glob("*.onnx")  # exported by ``demo``
    before = fleet.stat().st_ino, fleet.stat().st_mtime_ns
    running = start(tmp_path, installed, fleet, *paths)
    try:
        page = DemoPage(chrome, running.address)
        page.shows("#head", "50 tasks")
        page.shows("#head", re.search(r"of [\d.]+ MB", demo_header(demo, chrome))[0])  # type: ignore[index]
        page.classify(PICTURE)
        page.find("#tasks input").first.check()
        page.expect(page.find("#answers .card")).to_have_count(50, timeout=WAIT)
        assert page.playwright.evaluate("document.documentElement.scrollHeight") == 800
        assert len({str(a) for n, a in page.answers().items() if n.startswith("task")}) == 1
        page.shows("#answers .facts", "for one pass, 50 tasks")
        swap_train_and_export_among_fifty(page, tmp_path)
        assert not page.errors
        page.context.close()
        assert (fleet.stat().st_ino, fleet.stat().st_mtime_ns) == before  # not exported again
    finally:
        running.end()


def demo_header(demo: Demo, chrome: Any) -> str:
    """The header of the page with the bundled tasks."""
    page = DemoPage(chrome, demo.address)
    text = str(page.find("#head").inner_text())
    page.context.close()
    return text


def swap_train_and_export_among_fifty(page: DemoPage, tmp_path: Path) -> None:
    """Use the other tabs with some of the fifty tasks."""
    page.tab("Skills")
    rows = page.find("#resident tbody tr")
    page.expect(rows).to_have_count(50)
    shutil.copyfile(BUNDLED / "shape.ckpt", tmp_path / "one more.ckpt")
    page.upload("#upload", tmp_path / "one more.ckpt")
    page.see("#upload .file-preview")
    page.click("#add")
    page.shows("#verdict", "one more joined the fleet with")
    page.expect(rows).to_have_count(51)
    page.choose("#verify-name", "task 07")
    page.click("#verify")
    page.shows("#verdict", "task 07 gives the same answers")
    page.choose("#remove-name", "task 33")
    page.click("#remove")
    page.shows("#verdict", "task 33 was removed")
    page.expect(rows).to_have_count(50)

    page.tab("How it works")
    page.choose("#inside-task", "task 21")
    page.click("#look")
    page.see("#inside .chart")
    assert (
        page.see("#attention img").get_attribute("alt").startswith("Attention of the class token")
    )

    page.tab("Teach")
    for number, shade in enumerate((20, 220)):
        page.add_files(number, shades(tmp_path, shade, 6))
    page.fill("#train-name", "shades")
    page.click("#train")
    page.expect(page.find("#curve .done")).to_be_visible(timeout=TRAINING)
    page.shows("#head", "51 tasks")

    page.tab("Take home")
    page.choose("#export-task", "shades")
    page.click("#export")
    page.shows("#exported", "shades is merged and verified")
    with page.playwright.expect_download() as download:
        page.see("#files a[download]").first.click()
    download.value.save_as(tmp_path / "shades.onnx")

    page.tab("Ask")
    answers = page.classify(BUNDLED / "colour-green.png")
    assert set(answers) >= {"shades", "one more", "task 07"} and "task 33" not in answers
    classifier = load_classifier(tmp_path / "shades.onnx", options=EngineOptions(threads=1))
    (answer,) = classifier.predict([read_image(BUNDLED / "colour-green.png")], 4)
    assert answers["shades"] == pytest.approx(dict(answer), abs=2e-5)
