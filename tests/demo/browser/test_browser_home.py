"""The view Take home in a real browser: the files that it gives work elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from browser_support import PICTURE, TASKS, violations
from demo_page import DemoPage

from aoft_demo.tasks.shared_fleet import BUNDLED

pytestmark = pytest.mark.slow

TAB = ("[role=tabpanel]",)
OTHERS = ("#export-task", "#export", "#export-all", "#artefact", "#manifest")
"""Gradio's own dropdown and buttons."""


def make(page: DemoPage, key: str) -> None:
    """Choose a format and make the file."""
    option = page.find(f"#formats input[value='{key}']")
    if not option.is_visible():
        page.find("#formats summary").click()
    option.check()
    page.click("#export")
    page.shows("#exported .verdict", re.compile("is merged and verified|as training wrote it"))


def save(page: DemoPage, folder: Path, *buttons: str) -> list[Path]:
    """Download files into a folder."""
    saved = []
    for button in buttons:
        with page.playwright.expect_download() as download:
            page.see(button).click()
        saved.append(folder / download.value.suggested_filename)
        download.value.save_as(saved[-1])
    return saved


def shown_code(page: DemoPage, name: str) -> str:
    """The lines below a caption of the next steps or of Show code."""
    caption = re.compile(f"^{name}")
    figure = page.find("#next-steps figure").filter(
        has=page.playwright.locator("figcaption", has_text=caption)
    )
    return str(figure.locator("pre").text_content())


def run(code: list[str], folder: Path, installed: dict[str, str]) -> str:
    """Run a command of the installed package in a folder; return what it prints."""
    environment = {**os.environ, **installed, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(code, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def command(line: str) -> list[str]:
    """A command line of the page, with its module in place of the installed script."""
    first, *rest = shlex.split(line)
    return [sys.executable, "-m", f"aoft_deploy.cli.{first.removeprefix('aoft-')}", *rest]


def test_a_downloaded_skill_gives_the_pages_answers_elsewhere(
    open_page: Callable[..., DemoPage], installed: dict[str, str], tmp_path: Path
) -> None:
    page = open_page()
    task = TASKS[0]
    answers = page.classify(PICTURE)[task]
    page.tab("Take home")
    page.choose("#export-task", task)
    page.expect(page.find("#formats input[disabled]")).not_to_have_count(0)
    make(page, "onnx")
    artefact, manifest_file = save(page, tmp_path, "#artefact", "#manifest")
    manifest = json.loads(manifest_file.read_text("utf-8"))
    assert artefact.name == f"{task}.onnx" and manifest_file.name == f"{task}.onnx.json"
    assert manifest["sha256"] == hashlib.sha256(artefact.read_bytes()).hexdigest()
    report = manifest["verification"]
    page.shows("#exported", f"on {report['images']} pictures the largest difference")
    page.shows("#exported", f"all {report['images']} answers agree")
    page.find("#exported .small summary").click()
    page.shows("#exported .figures", f"{report['max_abs']:.1e}")
    assert not violations(page, TAB, OTHERS)

    shutil.copyfile(PICTURE, tmp_path / "picture.png")
    line = shown_code(page, "Ask it about a picture")
    out = json.loads(run([*command(line), "--json", "--top", "9"], tmp_path, installed))
    found = {each["label"]: each["probability"] for each in out["classes"]}
    assert {label: found[label] for label in answers} == pytest.approx(answers, abs=2e-5)
    best = max(answers, key=lambda name: answers[name])
    python = shown_code(page, "Ask it in Python")
    assert repr(best) in run([sys.executable, "-c", python], tmp_path, installed)

    elsewhere = tmp_path / "again"  # Show code makes the same file from the skill's own file
    elsewhere.mkdir()
    shutil.copytree(
        tmp_path,
        elsewhere / "pictures",
        ignore=lambda _, names: [name for name in names if name != "picture.png"],
    )
    shutil.copyfile(BUNDLED / f"{task}.ckpt", elsewhere / f"{task}.ckpt")
    page.find("#next-steps details.code summary").click()
    assert shown_code(page, "Shell") == manifest["command"]
    printed = run(command(shown_code(page, "Shell")), elsewhere, installed)
    assert "agreement 100.0%" in printed
    made = elsewhere / artefact.name
    assert made.read_bytes() == artefact.read_bytes()
    made.unlink()
    made.with_name(f"{made.name}.json").unlink()
    assert "agreement=1.0" in run(
        [sys.executable, "-c", shown_code(page, "Python")], elsewhere, installed
    )
    assert made.read_bytes() == artefact.read_bytes()


def test_folders_small_files_and_all_skills_at_once(
    open_page: Callable[..., DemoPage], installed: dict[str, str], tmp_path: Path
) -> None:
    page = open_page(color_scheme="dark")
    task = TASKS[1]
    answers = page.classify(PICTURE)
    page.tab("Take home")
    page.choose("#export-task", task)
    page.playwright.set_viewport_size({"width": 390, "height": 844})
    make(page, "checkpoint")
    (own,) = save(page, tmp_path, "#artefact")
    assert own.read_bytes() == (BUNDLED / f"{task}.ckpt").read_bytes()
    page.expect(page.find("#manifest")).to_have_count(0)
    assert task in run(command(shown_code(page, "See what is in it")), tmp_path, installed)

    make(page, "timm")
    page.shows("#exported", f"{task}.safetensors")
    make(page, "peft")
    page.shows("#exported", f"{task}.peft.zip")
    (packed,) = save(page, tmp_path, "#artefact")
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(tmp_path)
    shutil.copyfile(PICTURE, tmp_path / "picture.png")
    printed = run(command(shown_code(page, "Ask it about a picture")), tmp_path, installed)
    best = max(answers[task], key=lambda name: answers[task][name])
    assert best in printed

    page.click("#export-all")
    page.shows("#exported .verdict", f"{len(TASKS)} skills in one file are merged and verified")
    (together,) = save(page, tmp_path, "#artefact")
    line = command(shown_code(page, "Ask it about a picture"))
    assert together.name == "all-skills.onnx" and line[-2] == TASKS[0]
    for name in TASKS:
        line[-2] = name
        printed = run([*line, "--json"], tmp_path, installed)
        best = max(answers[name], key=lambda label: answers[name][label])
        assert json.loads(printed)["classes"][0]["label"] == best
    assert page.playwright.evaluate("document.documentElement.scrollWidth") == 390
    for part in ("#export", "#export-all", "#artefact", "#formats .format"):
        assert page.find(part).first.bounding_box()["height"] >= 36
    box = page.find("#exported").bounding_box()
    assert 0 <= box["y"] < 844  # the result is on the screen after the click
    assert not violations(page, TAB, OTHERS)


def test_errors_are_sentences_and_keep_the_earlier_file(
    open_page: Callable[..., DemoPage],
) -> None:
    page = open_page()
    page.tab("Take home")
    make(page, "checkpoint")
    page.find("#formats input[value=timm]").evaluate(
        "e => { e.value = 'nothing'; e.checked = true; }"
    )
    page.click("#export")
    page.shows("#exported [role=alert]", "Choose a format first.")
    page.shows("#artefact", f"Download {TASKS[0]}.ckpt")
    make(page, "onnx-uint8")
    page.shows("#artefact", f"Download {TASKS[0]}-uint8.onnx")
