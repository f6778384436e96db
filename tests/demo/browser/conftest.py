"""Fixtures of the browser tests: the installed demo, a browser, and pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import browser
from browser_support import start
from demo_page import DemoPage
from running_demo import Demo, install


@pytest.fixture(scope="module")
def installed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables with which the installed wheel runs."""
    return install(root, tmp_path_factory.mktemp("wheel"))


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
