"""The demo's page in a browser tab, for tests."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["WAIT", "DemoPage"]

WAIT = 120_000
"""Milliseconds to wait on a busy machine."""

ANSWERED = """() => {
    const stage = document.querySelector("#picture .stage");
    const answers = document.querySelector("#answers [data-picture]");
    return stage.dataset.state !== "sending" && answers?.dataset.picture === stage.dataset.picture;
}"""
"""JavaScript: whether the answers belong to the picture that is shown."""


class DemoPage:
    """A browser tab with the demo's page; it records requests and JavaScript errors.

    Args:
        chrome: The browser.
        address: The demo's address.
        context: Options of Playwright's browser context.

    Attributes:
        context: Playwright's browser context.
        playwright: Playwright's page.
        requests: Addresses that the page requested.
        errors: JavaScript errors.
    """

    def __init__(self, chrome: Any, address: str, **context: Any) -> None:
        from playwright.sync_api import expect

        self.expect = expect
        self.context = chrome.new_context(**{"viewport": {"width": 1280, "height": 800}, **context})
        self.playwright = self.context.new_page()
        self.playwright.set_default_timeout(WAIT)
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.playwright.on("request", lambda request: self.requests.append(request.url))
        self.playwright.on("pageerror", lambda error: self.errors.append(str(error)))
        self.playwright.goto(address)
        self.ready()

    def ready(self) -> None:
        """Wait until the page shows answers, and the server knows the page's session."""
        self.playwright.wait_for_selector("#answers [data-picture]", state="attached")
        self.playwright.wait_for_function("window.aoft?.attached")

    def find(self, selector: str) -> Any:
        """The elements of a selector, which may not exist yet."""
        return self.playwright.locator(selector)

    def see(self, selector: str) -> Any:
        """Wait for an element and return it."""
        self.playwright.wait_for_selector(selector)
        return self.find(selector)

    def tab(self, name: str) -> None:
        """Switch to one of the demo's tabs, which a narrow window may have in a menu."""
        tab = self.playwright.get_by_role("tab", name=name, exact=True)
        if not tab.count():
            self.playwright.get_by_label("More tabs").click()
            tab = self.find(".overflow-dropdown button").filter(has_text=name)
        tab.click()

    def shows(self, selector: str, text: str | re.Pattern[str]) -> None:
        """Wait until an element contains a text and can be seen."""
        self.expect(self.find(selector)).to_contain_text(text, timeout=WAIT)
        self.expect(self.find(selector)).to_be_visible(timeout=WAIT)

    def shows_message(self, text: str | re.Pattern[str]) -> None:
        """Wait for one of Gradio's messages."""
        toast = self.find(".toast-body").filter(has_text=text).first
        self.expect(toast).to_be_visible(timeout=WAIT)

    def choose(self, selector: str, name: str) -> None:
        """Choose an entry of a dropdown by typing."""
        field = self.find(f"{selector} input")
        field.fill(name)
        field.press("Enter")
        self.expect(field).to_have_value(name)

    def fill(self, selector: str, text: str) -> None:
        """Type into a text field."""
        self.find(f"{selector} input, {selector} textarea").fill(text)

    def click(self, selector: str) -> None:
        """Click an element."""
        self.find(selector).click()

    def upload(self, selector: str, *files: Path) -> None:
        """Upload files into a field."""
        self.find(f"{selector} input[type=file]").set_input_files([str(f) for f in files])

    def add_files(self, number: int, files: Sequence[Path]) -> None:
        """Add files to a tile of the view Teach, by its position, and wait until they are there."""
        tile = self.find("#teach-tiles .tile").nth(number)
        before = int(tile.get_attribute("data-count"))
        tile.locator("input[type=file]").set_input_files([str(file) for file in files])
        want = str(before + len(files))
        self.expect(tile).to_have_attribute("data-count", want, timeout=WAIT)

    def answers(self) -> dict[str, dict[str, float]]:
        """The displayed probabilities, by task and class."""
        return {
            card.get_attribute("data-task"): {
                row.get_attribute("data-label"): float(row.get_attribute("data-p"))
                for row in card.locator(".line").all()
            }
            for card in self.find("#answers .card").all()
        }

    def answered(self) -> dict[str, dict[str, float]]:
        """Wait for the answers for the picture that is shown."""
        self.playwright.wait_for_function(ANSWERED)
        return self.answers()

    def classify(self, picture: Path) -> dict[str, dict[str, float]]:
        """Upload a picture and wait for the answers."""
        self.upload("#picture", picture)
        return self.answered()
