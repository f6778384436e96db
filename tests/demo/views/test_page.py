"""The whole page without a browser: what its events show, and to whom."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from typing import Any

import pytest
from page_events import PageEvents

from aoft_demo.tasks.session_registry import SessionRegistry
from aoft_demo.tasks.shared_fleet import SharedFleet, bundled_checkpoints
from aoft_demo.views.page import build

KEY, OTHER_KEY = "0" * 31 + "1", "0" * 31 + "2"


@pytest.fixture(scope="module")
def registry(shared: SharedFleet) -> Iterator[SessionRegistry]:
    sessions = SessionRegistry(shared)
    yield sessions
    sessions.close()


@pytest.fixture(scope="module")
def page(registry: SessionRegistry) -> PageEvents:
    async def made() -> PageEvents:  # Gradio needs an event loop
        return PageEvents(build(registry))

    events = asyncio.run(made())
    assert len(registry) == 0  # the session that filled the page is gone
    return events


@pytest.fixture
def visit(registry: SessionRegistry, page: PageEvents) -> Iterator[PageEvents]:
    """The page; the sessions of a test end with it."""
    yield page
    for visitor in list(registry._pages):
        session = registry.get(visitor)
        registry.leave(visitor)
        session.end()
    registry._forget(registry._sessions())


def shown(html: str) -> list[str]:
    """The skills whose answers are shown."""
    return re.findall(r'<section class="card[^>]* data-task="([^"]+)"', html)


def load(page: PageEvents, visitor: str, key: str) -> dict[str, Any]:
    """What a page shows after it was loaded, by ``elem_id``; without what it showed already."""
    (handler,) = page.handlers("page", "load")
    empty = [None] * (len(handler.inputs) - 1)
    values = page.call("page", "load", key, *empty, visitor=visitor)
    assert len(values) == len(handler.outputs)
    return dict(zip([part.elem_id for part in handler.outputs], values, strict=True))


def test_skills_that_are_off_do_not_answer(visit: PageEvents, registry: SessionRegistry) -> None:
    picture, session = str(registry.shared.examples[1]), registry.get("a")
    first, *others = session.tasks
    before = visit.call("picture", "change", picture, visitor="a")
    assert shown(before) == [first, *others]
    visit.call("rows", "switched", visitor="a", data={"name": first, "on": False})
    after = visit.call("picture", "change", picture, visitor="a")
    assert shown(after) == others
    saved = [re.findall(r"<b>([\d.]+× less)</b>", html) for html in (before, after)]
    assert saved[0] == saved[1] != []  # memory does not depend on what is on
    assert shown(visit.call("picture", "change", picture, visitor="b")) == [first, *others]
    for name in others:
        visit.call("rows", "switched", visitor="a", data={"name": name, "on": False})
    assert "No skill is on" in visit.call("picture", "change", picture, visitor="a")
    visit.call("rows", "switched", visitor="a", data={"name": first, "on": True})
    assert shown(visit.call("picture", "change", picture, visitor="a")) == [first]


def test_a_reload_shows_what_the_visitor_has_changed(
    visit: PageEvents, registry: SessionRegistry
) -> None:
    fresh = load(visit, "a", KEY)
    assert fresh["picture"] == {"example": 0} and not isinstance(fresh["rows"], str)
    first, *others = registry.shared.tasks
    visit.call("rows", "removed", visitor="a", data={"name": first})
    visit.call("picture", "change", str(registry.shared.examples[2]), visitor="a")
    visit.call("tab", "unload", visitor="a")
    again = load(visit, "a again", KEY)
    assert again["picture"] == {"example": 2}
    assert 'data-picture="example-2"' in again["answers"] and shown(again["answers"]) == others
    assert f"{len(others)} skills" in again["head"] and "was removed." in again["rows"]
    stranger = load(visit, "b", OTHER_KEY)
    assert stranger["picture"] == {"example": 0} and not isinstance(stranger["answers"], str)


def test_a_closed_page_is_left(visit: PageEvents, registry: SessionRegistry) -> None:
    session = registry.get("a")
    visit.call("tab", "unload", visitor="a")
    assert session.ended and len(registry) == 0


def test_every_change_of_the_skills_refreshes_all_views(visit: PageEvents) -> None:
    (attached,) = visit.handlers("page", "load")
    everything = {part.elem_id for part in attached.outputs}
    assert everything >= {"head", "picture", "answers", "rows", "export-task", "inside-task"}
    for part, event in (
        ("rows", "switched"),
        ("rows", "removed"),
        ("rows", "restored"),
        ("rows", "added"),
        ("train", "click"),
    ):
        (change,) = visit.handlers(part, event)
        following = [
            each
            for each in visit.page.fns.values()
            if each.trigger_after == change._id and each.trigger_only_on_success
        ]
        assert [{x.elem_id for x in each.outputs} for each in following] == [everything], part


def test_what_was_done_is_said_to_the_visitor_who_did_it(
    visit: PageEvents, registry: SessionRegistry
) -> None:
    first, second = list(registry.shared.tasks)[:2]
    for name in (first, second):
        said = visit.call("rows", "removed", visitor="a", data={"name": name})
        assert said == "" and registry.get("a").removed == name  # the row with Undo says it
    assert f"<b>{second}</b> is back." in visit.call("rows", "restored", visitor="a", data={})
    assert "No task was removed" in visit.call("rows", "restored", visitor="b", data={})
    assert "Unknown task" in visit.call("rows", "removed", visitor="a", data={"name": first})
    for data in ({}, {"name": 7}, "text"):
        said = visit.call("rows", "removed", visitor="a", data=data)
        assert "The page has sent no skill: reload it." in said
    assert list(registry.get("b").tasks) == list(registry.shared.tasks)


def test_the_chosen_skill_is_proved_and_made(visit: PageEvents, registry: SessionRegistry) -> None:
    picture, name = str(registry.shared.examples[1]), list(registry.shared.tasks)[1]
    html = visit.call("rows", "proved", picture, visitor="a", data={"name": name})
    assert f'<div data-task="{name}">' in html and "The answers are the same" in html
    refused = visit.call("rows", "proved", None, visitor="a", data={"name": name})
    assert "Choose a picture in the tab Ask first." in refused
    *_, (panel, file, manifest, _) = visit.call("export", "click", name, "checkpoint", visitor="a")
    assert f"<b>{name}</b>" in panel and manifest.constructor_args == {"visible": False}
    checkpoint = next(path for path in bundled_checkpoints() if path.stem == name)
    with open(file.constructor_args["value"], "rb") as made:
        assert made.read() == checkpoint.read_bytes()
    ((panel, *kept),) = visit.call("export", "click", "nothing", "checkpoint", visitor="a")
    assert "Unknown task" in panel and all("value" not in each for each in kept)
