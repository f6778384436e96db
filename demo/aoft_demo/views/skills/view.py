"""The view Skills: switch, add, remove and prove skills while the fleet runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from aoft_demo.actions.residents import residents
from aoft_demo.actions.skill_cards import skill_card
from aoft_demo.actions.verification import verify
from aoft_demo.tasks.session import Session
from aoft_demo.tasks.session_registry import SessionRegistry
from aoft_demo.views import notices
from aoft_demo.views.failures import failure_message, show_failures
from aoft_demo.views.skills import cards, proof
from aoft_demo.views.view import View
from aoft_deploy.errors import CheckpointError, SettingError

__all__ = ["skills_view"]

SCRIPT = Path(__file__).with_name("skills.js").read_text("utf-8")

MOST_FILES = 16
"""Checkpoints that are added at once."""


def skills_view(sessions: SessionRegistry, picture: Any) -> View:
    """Lay out the view and connect its events.

    Args:
        sessions: All sessions.
        picture: The picture of the view Ask.
    """
    with gr.Row(elem_id="skills", equal_height=False):
        with gr.Column(scale=7, min_width=300):
            said = gr.HTML(elem_id="said", js_on_load=None, apply_default_css=False)
            rows: Any = gr.HTML(elem_id="rows", js_on_load=SCRIPT, apply_default_css=False)
        with gr.Column(scale=6, min_width=300):
            panel = gr.HTML(proof.START, elem_id="proof", js_on_load=None, apply_default_css=False)

    def acting(act: Callable[[Session, Any], str]) -> Callable[..., str]:
        """A handler that acts on the session's tasks and says what happened."""

        @show_failures("That did not work")
        def handle(event: gr.EventData, request: gr.Request) -> str:
            return act(sessions.get(request.session_hash), _data(event))

        return handle

    def switch(session: Session, data: Any) -> str:
        session.switch(_text(data, "name"), data.get("on") is True)
        return ""

    def remove(session: Session, data: Any) -> str:
        session.remove(_text(data, "name"))
        return ""  # the row with Undo says it

    def restore(session: Session, data: Any) -> str:
        return notices.success(session.restore(), "is back.")

    def add(session: Session, data: Any) -> str:
        files = data.get("files")
        if not isinstance(files, list) or not files:
            raise CheckpointError("Choose a model.ckpt first.")
        return "".join(_added(session, file) for file in files[:MOST_FILES])

    @show_failures("Not proved")
    def prove(path: str | None, event: gr.EventData, request: gr.Request) -> str:
        if not path:
            raise SettingError("Choose a picture in the tab Ask first.")
        session = sessions.get(request.session_hash)
        name = _text(_data(event), "name")
        return proof.proof_card(name, verify(session, name, Path(path)))

    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    changes = [
        event(acting(act), None, said, trigger_mode="multiple", **private)  # no click is lost
        for event, act in (
            (rows.switched, switch),
            (rows.removed, remove),
            (rows.restored, restore),
            (rows.added, add),
        )
    ]
    rows.proved(prove, picture, panel, concurrency_limit=2, trigger_mode="always_last", **private)

    def refresh(session: Session) -> list[Any]:
        tasks = residents(session)
        about = {task.name: skill_card(session, task.name) for task in tasks}
        return [cards.rows(session, tasks, about)]

    return View([], [rows], refresh, changes)


def _data(event: gr.EventData) -> dict[str, Any]:
    """What the page sent with an event."""
    return event._data if isinstance(event._data, dict) else {}


def _text(data: Any, key: str) -> str:
    """A text of an event's data."""
    value = data.get(key)
    if not isinstance(value, str):
        raise SettingError("The page has sent no skill: reload it.")
    return value


def _added(session: Session, file: Any) -> str:
    """Add a task from an uploaded file; say that it was added, or why not.

    Args:
        session: The session.
        file: Mapping with the ``path`` of the upload, and the ``name`` of the visitor's file, with
            its folders if the browser tells them.
    """
    path, given = (file.get("path"), file.get("name")) if isinstance(file, dict) else ("", None)
    folder = Path(gr.utils.get_upload_folder()).resolve()
    if not isinstance(path, str) or not isinstance(given, str) or "\0" in path:
        return notices.failure("Not added", "This file was not uploaded.")
    checkpoint = Path(path).resolve()
    if not checkpoint.is_relative_to(folder) or not checkpoint.is_file():
        return notices.failure("Not added", "This file was not uploaded.")
    name, file_name = session.free_name(_wanted(given[:400])), Path(given).name[-200:]
    try:
        task = session.add(checkpoint, name)
    except Exception as error:
        text = failure_message(error).replace(f"{name}.ckpt", file_name)
        return notices.failure(f"{file_name} was not added", text)
    return notices.success(name, f"joined the fleet with {len(task.classes)} classes.")


def _wanted(given: str) -> str:
    """A task's name from a file's: its stem, or its folder for a ``model.ckpt``."""
    path = Path(given)
    return path.parent.name if path.stem == "model" and path.parent.name else path.stem
