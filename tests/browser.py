"""A real browser for the tests: where Chromium is, and how it is got where it is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ARGUMENTS = (
    "--no-sandbox",  # as root there is none
    "--disable-gpu-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--use-fake-device-for-media-stream",  # a webcam that shows a pattern, and may be used
    "--use-fake-ui-for-media-stream",
)

HOW = "The browser tests need Chromium: apt-get install chromium, as root, or name it in CHROMIUM."


def chromium() -> str:
    """The program, installed with apt-get where it is missing and we may."""
    names = [os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome"]
    for name in filter(None, names):
        if found := shutil.which(name):
            return found
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise RuntimeError(HOW)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends"]
    for command in (["apt-get", "update", "-qq"], [*install, "chromium", "fonts-dejavu-core"]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{HOW} ({done.stderr.strip()[-300:]})")
    found = shutil.which("chromium")
    if not found:
        raise RuntimeError(HOW)
    return found


@contextmanager
def browser() -> Iterator[Any]:
    """Chromium without a window, for as long as the block runs."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=chromium(), headless=True, args=list(ARGUMENTS)
        )
        try:
            yield running
        finally:
            running.close()
