"""What the demo's browser tests share: the installed command, and the library's own answers."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demo_page import DemoPage
from running_demo import Demo

from aoft_demo.tasks.shared_fleet import BUNDLED, bundled_checkpoints
from aoft_demo.tasks.skills import bundled_examples
from aoft_deploy.artefacts.manifest import manifest_path, read_manifest
from aoft_deploy.checkpoints.checkpoint import read_checkpoint
from aoft_deploy.checkpoints.opening import load
from aoft_deploy.data.images import read_image

__all__ = [
    "PICTURE",
    "PICTURES",
    "TASKS",
    "TRAINING",
    "bundled_fleet",
    "library_answers",
    "start",
    "take_picture",
    "violations",
]

TASKS = [path.stem for path in bundled_checkpoints()]
PICTURES = [example.file for example in bundled_examples()]
PICTURE = PICTURES[0]
TRAINING = 300_000
"""Milliseconds to wait for a training on a busy machine."""


def start(folder: Path, installed: dict[str, str], *arguments: Path) -> Demo:
    """Start the installed demo; its working directory and temporary files are elsewhere."""
    temporary, cwd = folder / "it's #1 é ?%41 tmp", folder / "cwd"
    temporary.mkdir()
    cwd.mkdir()
    return Demo(temporary / "log", *arguments, cwd=cwd, environment=installed)


def bundled_fleet() -> Path:
    """The cached fleet of the bundled tasks; other tests' demos may have put theirs beside it."""
    folder = Path(os.environ["AOFT_CACHE_DIR"], "demo")
    (found,) = (
        path
        for path in folder.glob("*.onnx")
        if [task["name"] for task in read_manifest(manifest_path(path))["tasks"]] == TASKS
    )
    return found


def library_answers(task: str, picture: Path) -> dict[str, float]:
    """Probabilities of the unmerged model, computed by the library."""
    import torch

    checkpoint = BUNDLED / f"{task}.ckpt"
    tuned, preprocessing = load(checkpoint).eval(), read_checkpoint(checkpoint).preprocessing
    pixels = preprocessing(read_image(picture))
    with torch.inference_mode():
        logits = tuned(torch.from_numpy(pixels[None])).numpy()
    return dict(read_checkpoint(checkpoint).classes.answers(logits, 4)[0])


def violations(
    page: DemoPage, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[str]:
    """What axe finds, as a line for each rule: the rule, and the first elements.

    Args:
        page: The page.
        include: Selectors of the parts to look at; none is the whole page.
        exclude: Selectors of the parts to leave out, such as Gradio's own.
    """
    axe: Any = importlib.import_module("axe_playwright_python.sync_playwright")
    given = {"include": include, "exclude": exclude}
    context = {name: [[each] for each in parts] for name, parts in given.items() if parts}
    results = axe.Axe().run(page.playwright, context=context or None)
    return [
        f"{found['id']}: {[node['target'] for node in found['nodes']][:5]}"
        for found in results.response["violations"]
    ]


def take_picture(page: DemoPage, name: str) -> None:
    """Write a picture of the page for the documentation, to the folder in AOFT_SCREENSHOTS if set.

    Set it to docs/assets to update the pictures there.
    """
    if folder := os.environ.get("AOFT_SCREENSHOTS"):
        width, height = 1280, 800
        if page.playwright.viewport_size == {"width": width, "height": height}:
            page.playwright.evaluate("scrollTo(0, 0)")
            page.playwright.screenshot(path=Path(folder, name))
