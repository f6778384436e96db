"""The whole page in a real browser: unusable uploads, links, a reload, and fifty tasks."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bombs import flat
from browser_support import PICTURE, PICTURES, TASKS, TRAINING, bundled_fleet, start
from demo_page import WAIT, DemoPage
from PIL import Image
from running_demo import Demo
from teaching import shades

from aoft_demo.tasks.session import ON_AT_FIRST
from aoft_demo.tasks.shared_fleet import bundled_checkpoints
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
        "photo.heic": (b"\0\0\0\x18ftypheic" + bytes(200), "it is of the format HEIC"),
    }
    for name, (content, message) in pictures.items():
        (tmp_path / name).write_bytes(content)
        page.upload("#picture", tmp_path / name)
        page.shows("#answers [role=alert]", message)
        assert str(tmp_path) not in page.find("#answers").inner_text()
        assert "/" not in page.find("#answers p").inner_text()
        if name in ("text.png", "photo.heic"):  # a browser shows the beginning of a cut picture
            page.expect(page.find("#picture .unseen")).to_be_visible()
    for field, place, name in (
        ("#picture", ".wrong", "large.png"),
        ("#rows", ".sending", "large.ckpt"),
    ):
        with (tmp_path / name).open("wb") as file:
            file.truncate(100_000_000)
        page.tab("Ask" if field == "#picture" else "Skills")
        page.upload(field, tmp_path / name)
        page.shows(f"{field} {place}", f"{name} was not sent: it has 95 MB, and the demo takes at")
        assert not page.find(".toast-body").count()  # Gradio's message would cover the tabs
    page.tab("Ask")
    assert set(page.classify(PICTURE)) == set(TASKS)
    page.expect(page.find("#picture .unseen")).to_be_hidden()
    photograph = tmp_path / "photo.jpg"
    Image.open(PICTURE).convert("RGB").resize((8160, 6120)).save(photograph, quality=90)
    assert set(page.classify(photograph)) == set(TASKS)
    page.expect(page.find("#answers .strip")).to_have_attribute("data-pixels", "8160 × 6120 pixels")

    page.tab("Skills")
    (tmp_path / "cut.ckpt").write_bytes(bundled_checkpoints()[0].read_bytes()[:20_000])
    shutil.copyfile(make_checkpoint("aoft-lora-star"), tmp_path / "other.ckpt")
    page.upload("#rows", tmp_path / "cut.ckpt", tmp_path / "other.ckpt")
    page.shows("#said", "cut.ckpt is no checkpoint")
    page.shows("#said", "was trained on backbone weights")
    (tmp_path / "named.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    page.upload("#rows", tmp_path / "named.safetensors")
    page.shows("#said", "named.safetensors is a file of weights")
    assert page.find("#rows li").count() == len(TASKS)


def test_links_the_back_button_and_a_reload_keep_what_was_shown(
    open_page: Callable[..., DemoPage],
) -> None:
    page = open_page()
    page.tab("Skills")
    page.playwright.get_by_label(f"Remove {TASKS[0]}").click()
    page.shows("#rows .undo", f"{TASKS[0]} was removed")
    page.find(f"#rows [data-task='{TASKS[1]}'] [role=switch]").click()
    page.expect(page.find("#answers .card")).to_have_count(len(TASKS) - 2)
    page.tab("Race")
    assert page.playwright.url.endswith("#race")
    page.playwright.go_back()
    page.see("#rows li")
    page.tab("Ask")
    answers = page.classify(PICTURES[1])
    page.playwright.reload()
    page.ready()
    assert page.answered() == answers and len(answers) == len(TASKS) - 2
    key = page.playwright.evaluate("aoft.key()")
    assert re.fullmatch("[0-9a-f]{32}", key) and not any(key in url for url in page.requests)
    page.playwright.goto(f"{page.playwright.url.partition('#')[0]}#skills/{TASKS[-1]}")
    page.expect(page.find("#rows li.linked")).to_have_attribute("data-task", TASKS[-1])
    page.playwright.evaluate("location.hash = '#nothing/%'")
    page.tab("Ask")
    assert page.answered() == answers
    phone = open_page(viewport={"width": 360, "height": 700}, is_mobile=True, has_touch=True)
    phone.playwright.evaluate("location.hash = '#how'")
    phone.expect(phone.find("#tab-how")).to_be_visible()
    phone.tab("Take home")
    assert phone.playwright.url.endswith("#take-home")


FIRST_LOAD = 60, 350_000
"""Requests and bytes of the first load; Gradio itself needs about 40 and 230 KB of them."""


def test_the_first_load_is_small(demo: Demo, chrome: Any) -> None:
    context = chrome.new_context()
    page = context.new_page()
    sizes: list[int] = []
    network = context.new_cdp_session(page)
    network.send("Network.enable")
    network.on("Network.loadingFinished", lambda event: sizes.append(event["encodedDataLength"]))
    page.goto(demo.address)
    page.wait_for_function("window.aoft?.attached", timeout=WAIT)
    page.wait_for_load_state("load")
    page.wait_for_timeout(1000)
    context.close()
    assert 20 < len(sizes) <= FIRST_LOAD[0] and sum(sizes) <= FIRST_LOAD[1]


def test_a_lost_server_and_the_queue_are_reported(
    chrome: Any, installed: dict[str, str], tmp_path: Path
) -> None:
    running = start(tmp_path, installed)
    try:
        page = DemoPage(chrome, running.address)
        heard = "data: " + json.dumps({"msg": "estimation", "event_id": "a", "rank": 2}) + "\n\n"
        page.playwright.route("**/queue/data?test", lambda route: route.fulfill(body=heard))
        page.playwright.evaluate(
            "async () => { await (await fetch('gradio_api/queue/data?test')).text(); }"
        )
        page.shows("#queue", "2 requests before yours")
        page.playwright.wait_for_timeout(3500)  # the page has seen the server alive
        assert not page.find("#lost").is_visible()
        assert running.end() == 0
        assert [path.name for path in running.folder.iterdir()] == ["log"]
        page.shows("#lost", "The demo does not answer")
        page.playwright.route(
            "**/aoft/alive", lambda route: route.fulfill(json={"start": "another"})
        )
        page.shows("#lost", "The demo was started again")
        page.context.close()
    finally:
        running.end()


@pytest.mark.stress
def test_fifty_tasks_are_usable(
    demo: Demo, chrome: Any, installed: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    paths = [folder / f"task {i:02}.ckpt" for i in range(50 - len(TASKS))]
    for path in paths:
        shutil.copyfile(bundled_checkpoints()[0], path)
    fleet = bundled_fleet()  # exported by ``demo``
    before = fleet.stat().st_ino, fleet.stat().st_mtime_ns
    running = start(tmp_path, installed, fleet, *paths)
    try:
        page = DemoPage(chrome, running.address)
        page.shows("#head", "50 skills")
        page.shows("#head", re.search(r"one [\d.]+ MB model", demo_header(demo, chrome))[0])  # type: ignore[index]
        page.expect(page.find("#answers .card")).to_have_count(ON_AT_FIRST)
        assert page.playwright.evaluate("document.documentElement.scrollHeight") == 800
        page.tab("Skills")
        off = page.find("#rows [role=switch][aria-checked=false]")
        for left in range(50 - ON_AT_FIRST, 0, -1):
            page.expect(off).to_have_count(left, timeout=WAIT)
            off.first.click()
        page.expect(page.find("#answers .card")).to_have_count(50, timeout=WAIT)
        page.tab("Ask")
        assert len({str(a) for n, a in page.answered().items() if n.startswith("task")}) == 1
        page.shows("#answers .strip", "one pass, 50 skills")
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
    rows = page.find("#rows li")
    page.expect(rows).to_have_count(50)
    shutil.copyfile(bundled_checkpoints()[1], tmp_path / "one more.ckpt")
    page.upload("#rows", tmp_path / "one more.ckpt")
    page.shows("#said", "one more joined the fleet with")
    page.expect(rows).to_have_count(51)
    page.playwright.get_by_label("Prove it: task 07").click()
    page.see("#proof .scale")
    page.shows("#proof", "The answers are the same")
    page.playwright.get_by_label("Remove task 33").click()
    page.shows("#rows .undo", "task 33 was removed")
    page.expect(rows).to_have_count(50)

    page.tab("How it works")
    page.choose("#inside-task", "task 21")
    page.click("#look")
    page.see("#inside .chart")
    page.see("#attention img")
    for image in page.find("#attention img").all():
        assert image.get_attribute("alt").startswith("Attention of the class token")

    page.tab("Teach")
    for number, shade in enumerate((20, 220)):
        page.add_files(number, shades(tmp_path, shade, 6))
    page.fill("#train-name", "shades")
    page.click("#train")
    page.expect(page.find("#curve .done")).to_be_visible(timeout=TRAINING)
    page.shows("#head", "51 skills")

    page.tab("Take home")
    page.choose("#export-task", "shades")
    page.click("#export")
    page.shows("#exported", "shades is merged and verified")
    with page.playwright.expect_download() as download:
        page.click("#artefact")
    download.value.save_as(tmp_path / "shades.onnx")

    page.tab("Ask")
    answers = page.classify(PICTURES[1])
    assert set(answers) >= {"shades", "one more", "task 07"} and "task 33" not in answers
    classifier = load_classifier(tmp_path / "shades.onnx", options=EngineOptions(threads=1))
    (answer,) = classifier.predict([read_image(PICTURES[1])], 4)
    assert answers["shades"] == pytest.approx(dict(answer), abs=2e-5)
