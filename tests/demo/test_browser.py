"""The installed demo in a real browser: every flow, numbers against the library."""

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
from browser import browser
from PIL import Image
from running_demo import Demo, bomb, install

from aoft_demo.actions.evidence import accuracies
from aoft_demo.tasks.shared_fleet import BUNDLED, bundled_checkpoints
from aoft_demo.views.classify_tab import FRESH
from aoft_deploy.artefacts.prediction import load_classifier, ranked
from aoft_deploy.checkpoints.checkpoint import read_checkpoint
from aoft_deploy.checkpoints.opening import load
from aoft_deploy.data.images import read_image
from aoft_deploy.training.analysis.quantities import analyse_file

psutil: Any = importlib.import_module("psutil")  # its types are partial

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TASKS = [path.stem for path in bundled_checkpoints()]
PICTURE = BUNDLED / "digits-7.png"
WAIT = 120_000  # milliseconds that a busy machine may take
TRAINING = 300_000


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables with which the wheel runs, as a user of pip has it."""
    return install(tmp_path_factory.mktemp("wheel"))


def start(folder: Path, installed: dict[str, str], *arguments: Path) -> Demo:
    """The installed demo, with its working directory and temporary files away from the package."""
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


class Visit:
    """A browser tab at the demo, with all that it asked for and complained of."""

    def __init__(self, chrome: Any, address: str, **context: Any) -> None:
        from playwright.sync_api import expect

        self.expect = expect
        self.context = chrome.new_context(**{"viewport": {"width": 1280, "height": 800}, **context})
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT)
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(address)
        self.ready()

    def ready(self) -> None:
        """The page knows its visitor's tasks."""
        self.see("#tasks input")
        self.shows("#head", re.compile(r"[1-9]\d* tasks"))

    def see(self, selector: str) -> Any:
        """The element, once it is there."""
        self.page.wait_for_selector(selector)
        return self.page.locator(selector)

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()

    def shows(self, selector: str, text: str | re.Pattern[str]) -> None:
        self.expect(self.page.locator(selector)).to_contain_text(text, timeout=WAIT)

    def told(self, text: str | re.Pattern[str]) -> None:
        """A message about a fault has come."""
        toast = self.page.locator(".toast-body").filter(has_text=text).first
        self.expect(toast).to_be_visible(timeout=WAIT)

    def choose(self, selector: str, name: str) -> None:
        """Pick from a list by typing."""
        field = self.page.locator(f"{selector} input")
        field.fill(name)
        field.press("Enter")
        self.expect(field).to_have_value(name)

    def upload(self, selector: str, *files: Path) -> None:
        self.page.locator(f"{selector} input[type=file]").set_input_files([str(f) for f in files])

    def answers(self) -> dict[str, dict[str, float]]:
        return {
            card.get_attribute("data-task"): {
                row.get_attribute("data-label"): float(row.get_attribute("data-p"))
                for row in card.locator(".line").all()
            }
            for card in self.page.locator("#answers .card").all()
        }

    def clear(self) -> None:
        """Take the picture away, where there is one."""
        button = self.page.get_by_label("Remove Image")
        if button.count():
            button.first.click()
            self.shows("#answers", "Drop a picture")

    def classify(self, picture: Path) -> dict[str, dict[str, float]]:
        self.clear()
        self.upload("#picture", picture)
        self.see("#answers .card")
        return self.answers()


@pytest.fixture
def visit(demo: Demo, chrome: Any) -> Iterator[Callable[..., Visit]]:
    visits: list[Visit] = []

    def come(**context: Any) -> Visit:
        visits.append(Visit(chrome, demo.address, **context))
        return visits[-1]

    yield come
    for one in visits:
        assert not one.complaints
        foreign = [u for u in one.asked if not u.startswith((demo.address, "data:", "blob:"))]
        assert not foreign
        one.context.close()


def own_answers(task: str, picture: Path) -> dict[str, float]:
    """The unmerged model's, by the library alone."""
    import torch

    checkpoint = BUNDLED / f"{task}.ckpt"
    tuned, preprocessing = load(checkpoint).eval(), read_checkpoint(checkpoint).preprocessing
    pixels = preprocessing(read_image(picture))
    with torch.inference_mode():
        logits = tuned(torch.from_numpy(pixels[None])).numpy()
    return dict(ranked(logits, read_checkpoint(checkpoint).classes, 4)[0])


def test_classifying(visit: Callable[..., Visit]) -> None:
    page = visit()
    found = page.classify(PICTURE)
    assert set(found) == set(TASKS)
    for task in TASKS:
        expected = own_answers(task, PICTURE)
        assert found[task] == pytest.approx(expected, abs=2e-5)
    page.shows("#answers .facts", re.compile(r"one pass, \d tasks.*per answer.*to switch to them"))
    page.page.get_by_label("count", exact=True).uncheck()
    page.expect(page.page.locator("#answers .card")).to_have_count(len(TASKS) - 1)
    thumbnails = page.page.locator("#examples .thumbnail-item")
    assert thumbnails.count() == len(list(BUNDLED.glob("*.png")))
    for image in page.page.locator("#examples img").all():
        page.expect(image).to_have_js_property("complete", True)
        assert image.evaluate("e => e.naturalWidth") > 0
    thumbnails.first.click()
    page.shows("[data-task=colour] .top", "green")
    expected = own_answers("colour", sorted(BUNDLED.glob("*.png"))[0])
    assert page.answers()["colour"] == pytest.approx(expected, abs=2e-5)
    page.page.locator("#tasks input").first.focus()
    page.page.keyboard.press("Space")  # all, then none
    page.expect(page.page.locator("#answers .card")).to_have_count(len(TASKS))
    page.page.keyboard.press("Space")
    page.shows("#answers", "No task is chosen")


def test_classifying_what_the_webcam_sees(visit: Callable[..., Visit], tmp_path: Path) -> None:
    page = visit(permissions=["camera"])
    page.page.get_by_label("Capture from camera").click()
    page.page.get_by_text("Click to Access Webcam").click()
    page.see("#picture video")
    page.page.wait_for_function("document.querySelector('#picture video').readyState === 4")
    page.page.get_by_label("capture photo").click()
    page.see("#answers .card")
    taken = page.context.request.get(page.see("#picture img").get_attribute("src"))
    (tmp_path / "taken").write_bytes(taken.body())
    image = read_image(tmp_path / "taken")
    page.shows("#answers .facts", f"{image.width} × {image.height} pixels")
    found = page.answers()
    assert set(found) == set(TASKS)
    for task in TASKS:
        assert found[task] == pytest.approx(own_answers(task, tmp_path / "taken"), abs=2e-5)


def test_the_main_tab_needs_no_scrolling_and_a_phone_no_sideways_one(
    visit: Callable[..., Visit], tmp_path: Path
) -> None:
    pictures = os.environ.get("AOFT_SCREENSHOTS")  # docs, to renew those of the README
    folder = Path(pictures) if pictures else tmp_path
    size = "[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
    for scheme in ("light", "dark"):
        page = visit(color_scheme=scheme)
        page.classify(BUNDLED / "colour-green.png")
        assert page.page.evaluate(size) == [1280, 800]
        ink = page.page.locator(".card .top").first.evaluate("e => getComputedStyle(e).color")
        (red,) = re.findall(r"rgb\((\d+)", ink)
        assert (int(red) > 128) is (scheme == "dark")
        page.page.mouse.move(640, 790)
        page.page.screenshot(path=folder / f"demo-{scheme}.png")
    page = visit(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    page.classify(BUNDLED / "colour-green.png")
    assert page.page.evaluate(size)[0] == 390
    page.page.screenshot(path=folder / "demo-phone.png", full_page=True)
    assert page.page.locator("#answers .card").first.bounding_box()["width"] > 250


def test_swapping(visit: Callable[..., Visit], tmp_path: Path) -> None:
    page, other = visit(), visit()
    page.tab("Swap")
    rows = page.page.locator("#resident tbody tr")
    page.expect(rows).to_have_count(len(TASKS))
    checkpoint = tmp_path / "model.ckpt"
    shutil.copyfile(BUNDLED / "digits.ckpt", checkpoint)
    page.upload("#upload", checkpoint)
    page.see("#upload .file-preview")
    page.page.locator("#name input, #name textarea").fill("my digits")
    page.page.locator("#add").click()
    page.shows("#verdict", "my digits joined the fleet with 10 classes")
    page.expect(rows).to_have_count(len(TASKS) + 1)
    numbers = sum(p.numel() for p in load(checkpoint).trained().values())
    row = page.page.locator("#resident [data-task='my digits']")
    assert int(row.get_attribute("data-bytes")) == 4 * numbers
    page.choose("#verify-name", "my digits")
    page.page.locator("#verify").click()
    page.shows("#verdict", "my digits: The answers agree.")
    figures = page.page.locator("#verdict td").all_inner_texts()
    merged, fleet, largest = (float(figures[i]) for i in (1, 3, 5))
    assert 0 < merged < 1e-4 * largest and 0 < fleet < 1e-4 * largest
    assert figures[7] == "16 of 16 pictures"
    page.choose("#remove-name", "my digits")
    page.tab("Classify")
    found = page.classify(PICTURE)
    assert found["my digits"] == found["digits"]
    other.page.reload()
    other.ready()
    other.shows("#head", f"{len(TASKS)} tasks")
    page.tab("Swap")
    page.page.locator("#remove").click()
    page.shows("#verdict", "my digits has left")
    page.expect(rows).to_have_count(len(TASKS))


CHOOSERS = (
    ("Swap", "#remove-name"),
    ("Swap", "#verify-name"),
    ("Inside", "#inside-task"),
    ("Export", "#export-task"),
)


def test_each_list_points_at_what_was_chosen_whatever_comes_and_goes(
    visit: Callable[..., Visit], tmp_path: Path
) -> None:
    page = visit()

    def point_at(*names: str) -> None:
        for (tab, selector), name in zip(CHOOSERS, names, strict=True):
            page.tab(tab)
            page.expect(page.page.locator(f"{selector} input")).to_have_value(name)
        page.tab("Swap")

    point_at(*[TASKS[0]] * 4)
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
    page.page.locator("#add").click()
    page.shows("#head", f"{len(TASKS) + 1} tasks")
    point_at("count", "orientation", "digits", "shape")
    page.page.locator("#remove").click()
    page.shows("#verdict", "count has left")
    page.shows("#head", f"{len(TASKS)} tasks")
    point_at("", "orientation", "digits", "shape")
    page.page.locator("#remove").click()  # by a second click nothing goes that nobody chose
    page.shows("#verdict [role=alert]", "Choose a task to remove first.")
    page.choose("#remove-name", "digits")
    page.page.locator("#remove").click()
    page.shows("#verdict", "digits has left")
    point_at("", "orientation", "", "shape")
    page.tab("Inside")
    page.page.locator("#look").click()
    page.shows("#inside [role=alert]", "Choose a task to look into first.")
    page.page.reload()  # a new visitor, who has all that the demo began with
    page.ready()
    page.shows("#head", f"{len(TASKS)} tasks")
    point_at(*[TASKS[0]] * 4)


def test_answers_go_with_their_picture(visit: Callable[..., Visit]) -> None:
    page = visit()
    page.classify(PICTURE)
    held: list[Any] = []
    heard = threading.Event()

    def hold(route: Any) -> None:
        if heard.is_set():
            route.continue_()
        else:
            held.append(route)

    page.page.route("**/queue/join*", hold)  # the server does not hear of what comes now
    page.upload("#picture", BUNDLED / "colour-red.png")
    page.shows("#answers", "Looking at the picture")
    page.expect(page.page.locator("#answers .card")).to_have_count(0)
    heard.set()
    for route in held:
        route.continue_()
    page.shows("[data-task=colour] .top", "red")
    assert page.answers()["colour"] == pytest.approx(
        own_answers("colour", BUNDLED / "colour-red.png"), abs=2e-5
    )

    page.tab("Inside")
    page.page.locator("#look").click()
    page.see("#inside .chart")
    page.see("#attention img")
    page.shows("#inside", f"Inside {TASKS[0]}")
    page.tab("Classify")
    page.classify(PICTURE)
    page.tab("Inside")
    page.expect(page.page.locator("#attention img")).to_have_count(0)
    page.see("#inside .chart")
    page.choose("#inside-task", "digits")
    page.shows("#inside", "Nothing looked at yet")


def test_an_answer_that_comes_late_is_not_shown_under_another_picture(
    visit: Callable[..., Visit],
) -> None:
    page = visit()

    def shown(picture: str | None, html: str) -> str:
        told = None if picture is None else {"path": f"/tmp/x/uploads/{picture}/a.png"}
        return str(
            page.page.evaluate(f"([picture, html]) => ({FRESH})(picture, html)", [told, html])
        )

    of_one, fault = '<div data-picture="one">cards</div>', '<div role="alert">fault</div>'
    assert shown("one", of_one) == of_one
    assert "Looking at the picture" in shown("two", of_one)
    assert "Drop a picture" in shown(None, of_one)
    start = shown(None, of_one)
    assert shown(None, start) == start and "Looking" in shown("one", start)
    wait = shown("two", of_one)
    assert shown("two", wait) == wait and shown("two", fault) == fault


def test_looking_inside(visit: Callable[..., Visit]) -> None:
    page = visit()
    page.classify(PICTURE)
    page.tab("Inside")
    page.page.locator("#look").click()
    page.see("#inside .chart")
    task = page.page.locator("#inside-task input").input_value()
    expected = analyse_file(BUNDLED / f"{task}.ckpt")
    for kind in ("rows", "columns"):
        cells = page.page.locator(f"[data-family='backbone, {kind}'] td").all_inner_texts()
        assert cells[1] == f"{expected['angles'][kind]['mean']:.1f}°"
        assert cells[2] == f"{expected['angles'][kind]['sd']:.2f}°"
    for family in ("aoft-lora-star, down", "LoRA, up"):
        assert page.page.locator(f"[data-family='{family}']").count() == 1
    ratios = [x["change_ratio"] for x in expected["layers"] if x["change_ratio"] is not None]
    shown = page.page.locator("#inside .bars .value").all_inner_texts()
    assert shown == [f"{ratio:.3f}" for ratio in ratios]
    assert page.see("#attention img").get_attribute("alt").startswith("Where the class token")
    page.tab("Evidence")
    best = max(accuracies(), key=lambda a: a.mean)
    page.shows("#measured", f"{100 * best.mean:.1f} ± {100 * best.half:.1f}")


def test_training_and_exporting(visit: Callable[..., Visit], tmp_path: Path) -> None:
    page = visit()
    page.tab("Train")
    page.page.get_by_label("My pictures").check()
    for number, (name, shade) in enumerate((("dark", 20), ("light", 220)), 1):
        files = []
        for i in range(8):
            files.append(tmp_path / f"{name}-{i}.png")
            noise = np.random.default_rng(10 * number + i).integers(0, 30, (32, 32, 3))
            png(files[-1], (shade + noise).astype(np.uint8))
        page.page.locator(f"#class-{number} input, #class-{number} textarea").fill(name)
        page.upload(f"#pictures-{number}", *files)
        page.see(f"#pictures-{number} .file-preview")
    page.page.locator("#train-name input, #train-name textarea").fill("shades")
    page.page.get_by_label("quick", exact=True).check()
    page.page.locator("#train").click()
    page.page.wait_for_selector("#curve polyline", timeout=TRAINING)
    page.expect(page.page.locator("#curve")).to_contain_text("joined the fleet", timeout=TRAINING)
    assert float(page.page.locator("#curve [data-test]").get_attribute("data-test")) == 1.0
    with page.page.expect_download() as download:
        page.see("#trained a").first.click()
    trained = tmp_path / "trained.ckpt"
    download.value.save_as(trained)
    assert read_checkpoint(trained).classes == ("dark", "light")

    page.tab("Classify")
    found = page.classify(tmp_path / "light-0.png")["shades"]
    assert max(found, key=lambda name: found[name]) == "light"

    page.tab("Export")
    page.choose("#export-task", "shades")
    page.page.locator("#export").click()
    page.shows("#exported", "shades is merged and verified")
    saved: dict[str, Path] = {}
    for link in page.see("#files a[download]").all():
        with page.page.expect_download() as download:
            link.click()
        saved[Path(download.value.suggested_filename).suffix] = tmp_path / (
            "shades.onnx" + ".json" * download.value.suggested_filename.endswith(".json")
        )
        download.value.save_as(saved[Path(download.value.suggested_filename).suffix])
    manifest = json.loads(saved[".json"].read_text("utf-8"))
    assert manifest["sha256"] == hashlib.sha256(saved[".onnx"].read_bytes()).hexdigest()
    page.shows("#exported", f"{manifest['verification']['max_abs']:.1e}")
    classifier = load_classifier(saved[".onnx"], threads=1)
    (answer,) = classifier.classify([read_image(tmp_path / "light-0.png")], 2)
    assert dict(answer) == pytest.approx(found, abs=2e-5)


def training(demo: Demo) -> list[str]:
    """What a training of the demo's has running, and lying about."""
    children = psutil.Process(demo.process.pid).children(recursive=True)
    running = [" ".join(child.cmdline()) for child in children]
    return [command for command in running if "cli.train" in command] + [
        str(path) for path in demo.folder.glob("aoft-demo-*/visitor-*/training-*")
    ]


def test_a_training_that_is_stopped_adds_nothing(demo: Demo, visit: Callable[..., Visit]) -> None:
    page = visit()
    page.tab("Train")
    page.page.locator("#count input[type=number]").fill("60")
    page.page.locator("#train-name input, #train-name textarea").fill("halted")
    page.page.locator("#train").click()
    page.page.wait_for_selector("#curve polyline", timeout=TRAINING)
    assert len(training(demo)) == 2
    page.page.locator("#stop").click()
    page.shows("#curve [role=alert]", "Training was stopped; nothing was added.")
    assert training(demo) == []
    page.shows("#head", f"{len(TASKS)} tasks")
    page.tab("Classify")
    assert set(page.classify(PICTURE)) == set(TASKS)


def train(page: Visit, name: str, count: int) -> None:
    """Press Train for pictures that the demo draws."""
    page.tab("Train")
    page.page.locator("#count input[type=number]").fill(str(count))
    page.page.locator("#train-name input, #train-name textarea").fill(name)
    page.page.locator("#train").click()


def test_trainings_that_wait_can_be_stopped_and_those_who_leave_hold_up_nobody(
    demo: Demo, visit: Callable[..., Visit]
) -> None:
    first, second, third = visit(), visit(), visit()
    train(first, "first", 800)
    first.shows("#curve", re.compile("Preparing|Starting|epochs"))
    for page in (second, third):
        train(page, "mine", 60)
        page.shows("#curve", "Another training runs; yours begins when it ends")
    second.page.locator("#stop").click()
    second.shows("#curve [role=alert]", "Training was stopped; nothing was added.")
    first.page.wait_for_selector("#curve polyline", timeout=TRAINING)
    assert len(training(demo)) == 2
    first.page.goto("about:blank")  # in the middle of its training
    third.page.wait_for_selector("#curve polyline", timeout=TRAINING)
    assert len(training(demo)) == 2  # its own
    third.page.locator("#stop").click()
    third.shows("#curve [role=alert]", "Training was stopped; nothing was added.")
    assert training(demo) == []
    second.tab("Classify")
    assert set(second.classify(PICTURE)) == set(TASKS)


def png(path: Path, pixels: np.ndarray[Any, Any]) -> None:
    Image.fromarray(pixels).save(path)


def test_bad_uploads_are_told_and_leave_the_page_usable(
    visit: Callable[..., Visit], make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    page = visit()
    pictures = {
        "text.png": (b"no picture at all", "text.png"),
        "cut.png": (PICTURE.read_bytes()[:900], "cut.png"),
        "bomb.png": (bomb(), "bomb.png"),
        "empty.png": (b"", "empty.png"),
    }
    for name, (content, said) in pictures.items():
        (tmp_path / name).write_bytes(content)
        page.upload("#picture", tmp_path / name)
        page.see("#answers [role=alert]")
        page.shows("#answers [role=alert]", said)
        assert str(tmp_path) not in page.page.locator("#answers").inner_text()
        assert "/" not in page.page.locator("#answers p").inner_text()
        page.clear()
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(100_000_000)
    page.upload("#picture", large)
    page.told(re.compile("exceed the maximum allowed size.*large.png"))
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
    for name, said in (
        ("text.ckpt", "text.ckpt is no checkpoint"),
        ("cut.ckpt", "cut.ckpt is no checkpoint"),
        ("other.ckpt", "other.ckpt was trained on backbone weights"),
    ):
        page.upload("#upload", tmp_path / name)
        page.see("#upload .file-preview")
        page.page.locator("#add").click()
        page.shows("#verdict [role=alert]", said)
        page.page.locator("#upload button[aria-label='Clear']").first.click()
    (tmp_path / "large.ckpt").write_bytes(b"")
    with (tmp_path / "large.ckpt").open("wb") as file:
        file.truncate(100_000_000)
    page.upload("#upload", tmp_path / "large.ckpt")
    page.told(re.compile("exceed the maximum allowed size.*large.ckpt"))
    page.page.locator("#add").click()
    page.shows("#verdict [role=alert]", "Choose a model.ckpt first")
    assert page.page.locator("#resident tbody tr").count() == len(TASKS)
    page.tab("Train")
    page.page.locator("#train-name input, #train-name textarea").fill("digits")
    page.page.locator("#train").click()
    page.shows("#curve [role=alert]", "There is a task 'digits'")
    page.tab("Classify")
    assert set(page.classify(BUNDLED / "colour-red.png")) == set(TASKS)


def test_fifty_tasks_are_as_usable(
    demo: Demo, chrome: Any, installed: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    paths = [folder / f"task {i:02}.ckpt" for i in range(50 - len(TASKS))]
    for path in paths:
        shutil.copyfile(BUNDLED / "digits.ckpt", path)
    (kept,) = Path(os.environ["AOFT_CACHE_DIR"], "demo").glob("*.onnx")  # which ``demo`` made
    written = kept.stat().st_ino, kept.stat().st_mtime_ns
    running = start(tmp_path, installed, kept, *paths)
    try:
        page = Visit(chrome, running.address)
        page.shows("#head", "50 tasks")
        page.shows("#head", re.search(r"of [\d.]+ MB", demo_head(demo, chrome))[0])  # type: ignore[index]
        page.classify(PICTURE)
        page.page.locator("#tasks input").first.check()
        page.expect(page.page.locator("#answers .card")).to_have_count(50, timeout=WAIT)
        assert page.page.evaluate("document.documentElement.scrollHeight") == 800
        assert len({str(a) for n, a in page.answers().items() if n.startswith("task")}) == 1
        page.shows("#answers .facts", "one pass, 50 tasks")
        swap_train_and_export_among_fifty(page, tmp_path)
        assert not page.complaints
        page.context.close()
        assert (
            kept.stat().st_ino,
            kept.stat().st_mtime_ns,
        ) == written  # the fleet was not exported again
    finally:
        running.end()


def demo_head(demo: Demo, chrome: Any) -> str:
    """What the demo of the bundled tasks says at the top of its page."""
    page = Visit(chrome, demo.address)
    text = str(page.page.locator("#head").inner_text())
    page.context.close()
    return text


def swap_train_and_export_among_fifty(page: Visit, tmp_path: Path) -> None:
    """The other flows, with names that only some of the fifty have."""
    page.tab("Swap")
    rows = page.page.locator("#resident tbody tr")
    page.expect(rows).to_have_count(50)
    shutil.copyfile(BUNDLED / "shape.ckpt", tmp_path / "one more.ckpt")
    page.upload("#upload", tmp_path / "one more.ckpt")
    page.see("#upload .file-preview")
    page.page.locator("#add").click()
    page.shows("#verdict", "one more joined the fleet with")
    page.expect(rows).to_have_count(51)
    page.choose("#verify-name", "task 07")
    page.page.locator("#verify").click()
    page.shows("#verdict", "The answers agree.")
    page.choose("#remove-name", "task 33")
    page.page.locator("#remove").click()
    page.shows("#verdict", "task 33 has left")
    page.expect(rows).to_have_count(50)

    page.tab("Inside")
    page.choose("#inside-task", "task 21")
    page.page.locator("#look").click()
    page.see("#inside .chart")
    assert page.see("#attention img").get_attribute("alt").startswith("Where the class token")

    page.tab("Train")  # pictures that the demo draws
    page.choose("#kind", "colour")
    page.page.locator("#count input[type=number]").fill("60")
    page.page.locator("#train-name input, #train-name textarea").fill("drawn")
    page.page.get_by_label("quick", exact=True).check()
    page.page.locator("#train").click()
    page.expect(page.page.locator("#curve")).to_contain_text("joined the fleet", timeout=TRAINING)
    accuracy = float(page.page.locator("#curve [data-test]").get_attribute("data-test"))
    page.shows("#head", "51 tasks")

    page.tab("Export")
    page.choose("#export-task", "drawn")
    page.page.locator("#export").click()
    page.shows("#exported", "drawn is merged and verified")
    with page.page.expect_download() as download:
        page.see("#files a[download]").first.click()
    download.value.save_as(tmp_path / "drawn.onnx")

    page.tab("Classify")
    answers = page.classify(BUNDLED / "colour-green.png")
    assert set(answers) >= {"drawn", "one more", "task 07"} and "task 33" not in answers
    classifier = load_classifier(tmp_path / "drawn.onnx", threads=1)
    (answer,) = classifier.classify([read_image(BUNDLED / "colour-green.png")], 4)
    assert answers["drawn"] == pytest.approx(dict(answer), abs=2e-5)
    assert accuracy > 1.5 / len(classifier.classes)
