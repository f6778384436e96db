"""A real browser for the tests: where Chromium is, and how it is got where it is missing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from installed import program

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


def chromium() -> str:
    """The program, or the one that CHROMIUM names."""
    names = [os.environ.get("CHROMIUM", ""), "chromium-browser", "google-chrome", "chromium"]
    return program(names, ["chromium", "fonts-dejavu-core"])


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
