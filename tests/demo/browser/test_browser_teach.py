"""The views Teach and Take home in a real browser."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser_support import PICTURE, TASKS, TRAINING
from demo_page import DemoPage
from PIL import Image
from running_demo import Demo

from aoft_deploy.artefacts.engine import EngineOptions
from aoft_deploy.artefacts.prediction import load_classifier
from aoft_deploy.checkpoints.checkpoint import read_checkpoint
from aoft_deploy.data.images import read_image

psutil: Any = importlib.import_module("psutil")  # its types are partial

pytestmark = pytest.mark.slow


def test_training_and_exporting(open_page: Callable[..., DemoPage], tmp_path: Path) -> None:
    page = open_page()
    page.tab("Teach")
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

    page.tab("Ask")
    answers = page.classify(tmp_path / "light-0.png")["shades"]
    assert max(answers, key=lambda name: answers[name]) == "light"

    page.tab("Take home")
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
    page.tab("Teach")
    page.find("#count input[type=number]").fill("60")
    page.fill("#train-name", "halted")
    page.click("#train")
    page.playwright.wait_for_selector("#curve polyline", timeout=TRAINING)
    assert len(training_traces(demo)) == 2
    page.click("#stop")
    page.shows("#curve [role=alert]", "Training was stopped; nothing was added.")
    assert training_traces(demo) == []
    page.shows("#head", f"{len(TASKS)} tasks")
    page.tab("Ask")
    assert set(page.classify(PICTURE)) == set(TASKS)


def train(page: DemoPage, name: str, count: int) -> None:
    """Start a training with synthetic pictures."""
    page.tab("Teach")
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
    second.tab("Ask")
    assert set(second.classify(PICTURE)) == set(TASKS)


def png(path: Path, pixels: np.ndarray[Any, Any]) -> None:
    Image.fromarray(pixels).save(path)
