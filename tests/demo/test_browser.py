"""The installed demo in a real browser: every tab, with results compared to the library's."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bombs import flat
from browser import browser
from demo_page import WAIT, DemoPage
from PIL import Image
from running_demo import Demo, install

from aoft_demo.actions.evidence import accuracies
from aoft_demo.tasks.shared_fleet import BUNDLED, bundled_checkpoints
from aoft_demo.views.classify_tab import REMOVE_OLD_ANSWERS
from aoft_deploy.artefacts.engine import EngineOptions
from aoft_deploy.artefacts.prediction import load_classifier
from aoft_deploy.checkpoints.checkpoint import read_checkpoint
from aoft_deploy.checkpoints.opening import load
from aoft_deploy.data.images import read_image
from aoft_deploy.training.analysis.quantities import analyse_file

psutil: Any = importlib.import_module("psutil")  # its types are partial

pytestmark = pytest.mark.slow

TASKS = [path.stem for path in bundled_checkpoints()]
PICTURE = BUNDLED / "digits-7.png"
TRAINING = 300_000
"""Milliseconds to wait for a training on a busy machine."""


@pytest.fixture(scope="module")
def installed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables with which the installed wheel runs."""
    return install(root, tmp_path_factory.mktemp("wheel"))


def start(folder: Path, installed: dict[str, str], *arguments: Path) -> Demo:
    """Start the installed demo; its working directory and temporary files are elsewhere."""
    temporary, cwd = folder / "it's #1 é ?%41 tmp", folder / "cwd"
    temporary.mkdir()
    cwd.mkdir()
    return Demo(temporary / "log", *arguments, cwd=cwd, environment=installed)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, installed: dict[str, str]) -> Iterator[Demo]:
    running = start(tmp_path_factory.mktemp("demo"), installed)
    yield running
    assert running.end() == 0
    assert [path.name for path in running.folder.iterdir()] == ["log"]
    assert not any((running.folder.parent / "cwd").iterdir())


@pytest.fixture(scope="module")
def chrome() -> Iterator[Any]:
    with browser() as running:
        yield running


@pytest.fixture
def open_page(demo: Demo, chrome: Any) -> Iterator[Callable[..., DemoPage]]:
    """Open the demo's page; in the end it must have no JavaScript error and no foreign request."""
    pages: list[DemoPage] = []

    def open_one(**context: Any) -> DemoPage:
        pages.append(DemoPage(chrome, demo.address, **context))
        return pages[-1]

    yield open_one
    for page in pages:
        assert not page.errors
        foreign = [u for u in page.requests if not u.startswith((demo.address, "data:", "blob:"))]
        assert not foreign
        page.context.close()


def library_answers(task: str, picture: Path) -> dict[str, float]:
    """Probabilities of the unmerged model, computed by the library."""
    import torch

    checkpoint = BUNDLED / f"{task}.ckpt"
    tuned, preprocessing = load(checkpoint).eval(), read_checkpoint(checkpoint).preprocessing
    pixels = preprocessing(read_image(picture))
    with torch.inference_mode():
        logits = tuned(torch.from_numpy(pixels[None])).numpy()
    return dict(read_checkpoint(checkpoint).classes.answers(logits, 4)[0])


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


def test_swapping(open_page: Callable[..., DemoPage], tmp_path: Path) -> None:
    page, other = open_page(), open_page()
    page.tab("Swap")
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
    page.tab("Classify")
    answers = page.classify(PICTURE)
    assert answers["my digits"] == answers["digits"]
    other.playwright.reload()
    other.ready()
    other.shows("#head", f"{len(TASKS)} tasks")
    page.tab("Swap")
    page.click("#remove")
    page.shows("#verdict", "my digits was removed")
    page.expect(rows).to_have_count(len(TASKS))


DROPDOWNS = (
    ("Swap", "#remove-name"),
    ("Swap", "#verify-name"),
    ("Inside", "#inside-task"),
    ("Export", "#export-task"),
)


def test_each_dropdown_keeps_its_choice_while_tasks_come_and_go(
    open_page: Callable[..., DemoPage], tmp_path: Path
) -> None:
    page = open_page()

    def chosen_are(*names: str) -> None:
        for (tab, selector), name in zip(DROPDOWNS, names, strict=True):
            page.tab(tab)
            page.expect(page.find(f"{selector} input")).to_have_value(name)
        page.tab("Swap")

    chosen_are(*[TASKS[0]] * 4)
    for tab, selector, name in (
        ("Inside", "#inside-task", "digits"),
        ("Export", "#export-task", "shape"),
        ("Swap", "#verify-name", "orientation"),
        ("Swap", "#remove-name", "count"),
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
    page.tab("Inside")
    page.click("#look")
    page.shows("#inside [role=alert]", "Choose a task to look into first.")
    page.playwright.reload()  # a new session with all initial tasks
    page.ready()
    page.shows("#head", f"{len(TASKS)} tasks")
    chosen_are(*[TASKS[0]] * 4)


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

    page.tab("Inside")
    page.click("#look")
    page.see("#inside .chart")
    page.see("#attention img")
    page.shows("#inside", f"Inside {TASKS[0]}")
    page.tab("Classify")
    page.classify(PICTURE)
    page.tab("Inside")
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


def test_looking_inside(open_page: Callable[..., DemoPage]) -> None:
    page = open_page()
    page.classify(PICTURE)
    page.tab("Inside")
    page.click("#look")
    page.see("#inside .chart")
    task = page.find("#inside-task input").input_value()
    expected = analyse_file(BUNDLED / f"{task}.ckpt")
    for kind in ("rows", "columns"):
        cells = page.find(f"[data-family='backbone, {kind}'] td").all_inner_texts()
        assert cells[1] == f"{expected['angles'][kind]['mean']:.1f}°"
        assert cells[2] == f"{expected['angles'][kind]['sd']:.2f}°"
    for family in ("aoft-lora-star, down", "LoRA, up"):
        assert page.find(f"[data-family='{family}']").count() == 1
    ratios = [x["change_ratio"] for x in expected["layers"] if x["change_ratio"] is not None]
    shown = page.find("#inside .bars .value").all_inner_texts()
    assert shown == [f"{ratio:.3f}" for ratio in ratios]
    assert (
        page.see("#attention img").get_attribute("alt").startswith("Attention of the class token")
    )
    page.tab("Evidence")
    best = max(accuracies(), key=lambda a: a.mean)
    page.shows("#measured", f"{100 * best.mean:.1f} ± {100 * best.margin:.1f}")


def test_training_and_exporting(open_page: Callable[..., DemoPage], tmp_path: Path) -> None:
    page = open_page()
    page.tab("Train")
    page.playwright.get_by_label("My pictures").check()
    for number, (name, shade) in enumerate((("dark", 20), ("light", 220)), 1):
        files = []
        for i in range(8):
            files.append(tmp_path / f"{name}-{i}.png")
            noise = np.random.default_rng(10 * number + i).integers(0, 30, (32, 32, 3))
            png(files[-1], (shade + noise).astype(np.uint8))
        page.fill(f"#class-{number}", name)
        page.upload(f"#pictures-{number}", *files)
        page.see(f"#pictures-{number} .file-preview")
    page.fill("#train-name", "shades")
    page.playwright.get_by_label("quick", exact=True).check()
    page.click("#train")
    page.playwright.wait_for_selector("#curve polyline", timeout=TRAINING)
    page.expect(page.find("#curve")).to_contain_text("joined the fleet", timeout=TRAINING)
    assert float(page.find("#curve [data-test]").get_attribute("data-test")) == 1.0
    with page.playwright.expect_download() as download:
        page.see("#trained a").first.click()
    trained = tmp_path / "trained.ckpt"
    download.value.save_as(trained)
    assert read_checkpoint(trained).classes == ("dark", "light")

    page.tab("Classify")
    answers = page.classify(tmp_path / "light-0.png")["shades"]
    assert max(answers, key=lambda name: answers[name]) == "light"

    page.tab("Export")
    page.choose("#export-task", "shades")
    page.click("#export")
    page.shows("#exported", "shades is merged and verified")
    saved: dict[str, Path] = {}
    for link in page.see("#files a[download]").all():
        with page.playwright.expect_download() as download:
            link.click()
        saved[Path(download.value.suggested_filename).suffix] = tmp_path / (
            "shades.onnx" + ".json" * download.value.suggested_filename.endswith(".json")
        )
        download.value.save_as(saved[Path(download.value.suggested_filename).suffix])
    manifest = json.loads(saved[".json"].read_text("utf-8"))
    assert manifest["sha256"] == hashlib.sha256(saved[".onnx"].read_bytes()).hexdigest()
    page.shows("#exported", f"{manifest['verification']['max_abs']:.1e}")
    classifier = load_classifier(saved[".onnx"], options=EngineOptions(threads=1))
    (answer,) = classifier.predict([read_image(tmp_path / "light-0.png")], 2)
    assert dict(answer) == pytest.approx(answers, abs=2e-5)


def training_traces(demo: Demo) -> list[str]:
    """Commands and folders of the demo's trainings."""
    children = psutil.Process(demo.process.pid).children(recursive=True)
    running = [" ".join(child.cmdline()) for child in children]
    return [command for command in running if "cli.train" in command] + [
        str(path) for path in demo.folder.glob("aoft-demo-*/session-*/training-*")
    ]


def test_a_stopped_training_adds_nothing(demo: Demo, open_page: Callable[..., DemoPage]) -> None:
    page = open_page()
    page.tab("Train")
    page.find("#count input[type=number]").fill("60")
    page.fill("#train-name", "halted")
    page.click("#train")
    page.playwright.wait_for_selector("#curve polyline", timeout=TRAINING)
    assert len(training_traces(demo)) == 2
    page.click("#stop")
    page.shows("#curve [role=alert]", "Training was stopped; nothing was added.")
    assert training_traces(demo) == []
    page.shows("#head", f"{len(TASKS)} tasks")
    page.tab("Classify")
    assert set(page.classify(PICTURE)) == set(TASKS)


def train(page: DemoPage, name: str, count: int) -> None:
    """Start a training with synthetic pictures."""
    page.tab("Train")
    page.find("#count input[type=number]").fill(str(count))
    page.fill("#train-name", name)
    page.click("#train")


def test_waiting_trainings_can_be_stopped_and_closed_pages_do_not_block_the_queue(
    demo: Demo, open_page: Callable[..., DemoPage]
) -> None:
    first, second, third = open_page(), open_page(), open_page()
    train(first, "first", 200)
    first.shows("#curve", re.compile("Preparing|Starting|epochs"))
    for page in (second, third):
        train(page, "mine", 60)
        page.shows("#curve", "Waiting for another training to finish")
    second.click("#stop")
    second.shows("#curve [role=alert]", "Training was stopped; nothing was added.")
    first.playwright.wait_for_selector("#curve polyline", timeout=TRAINING)
    assert len(training_traces(demo)) == 2
    first.playwright.goto("about:blank")  # closes the page during its training
    third.playwright.wait_for_selector("#curve polyline", timeout=TRAINING)
    assert len(training_traces(demo)) == 2  # those of the third page
    third.click("#stop")
    third.shows("#curve [role=alert]", "Training was stopped; nothing was added.")
    assert training_traces(demo) == []
    second.tab("Classify")
    assert set(second.classify(PICTURE)) == set(TASKS)


def png(path: Path, pixels: np.ndarray[Any, Any]) -> None:
    Image.fromarray(pixels).save(path)


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

    page.tab("Swap")
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
    page.tab("Train")
    page.fill("#train-name", "digits")
    page.click("#train")
    page.shows("#curve [role=alert]", "There is a task 'digits'")
    page.tab("Classify")
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
    page.tab("Swap")
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

    page.tab("Inside")
    page.choose("#inside-task", "task 21")
    page.click("#look")
    page.see("#inside .chart")
    assert (
        page.see("#attention img").get_attribute("alt").startswith("Attention of the class token")
    )

    page.tab("Train")
    page.choose("#kind", "colour")
    page.find("#count input[type=number]").fill("60")
    page.fill("#train-name", "synthetic")
    page.playwright.get_by_label("quick", exact=True).check()
    page.click("#train")
    page.expect(page.find("#curve")).to_contain_text("joined the fleet", timeout=TRAINING)
    accuracy = float(page.find("#curve [data-test]").get_attribute("data-test"))
    page.shows("#head", "51 tasks")

    page.tab("Export")
    page.choose("#export-task", "synthetic")
    page.click("#export")
    page.shows("#exported", "synthetic is merged and verified")
    with page.playwright.expect_download() as download:
        page.see("#files a[download]").first.click()
    download.value.save_as(tmp_path / "synthetic.onnx")

    page.tab("Classify")
    answers = page.classify(BUNDLED / "colour-green.png")
    assert set(answers) >= {"synthetic", "one more", "task 07"} and "task 33" not in answers
    classifier = load_classifier(tmp_path / "synthetic.onnx", options=EngineOptions(threads=1))
    (answer,) = classifier.predict([read_image(BUNDLED / "colour-green.png")], 4)
    assert answers["synthetic"] == pytest.approx(dict(answer), abs=2e-5)
    assert accuracy > 1.5 / len(classifier.classes)
