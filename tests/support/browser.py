"""A real browser for the tests: Chromium, installed if it is missing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from installed import program

ARGUMENTS = (
    "--no-sandbox",  # root cannot use the sandbox
    "--disable-gpu-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--use-fake-device-for-media-stream",  # a webcam that shows a pattern
    "--use-fake-ui-for-media-stream",
)


def chromium() -> str:
    """Path of Chromium; the variable CHROMIUM overrides it."""
    names = [os.environ.get("CHROMIUM", ""), "chromium-browser", "google-chrome", "chromium"]
    return program(names, ["chromium", "fonts-dejavu-core"])


@contextmanager
def browser() -> Iterator[Any]:
    """Context manager: Chromium without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=chromium(), headless=True, args=list(ARGUMENTS)
        )
        try:
            yield running
        finally:
            running.close()
