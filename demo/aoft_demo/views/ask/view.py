"""The view Ask: a picture, and the answers of all skills that are on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from aoft_demo.actions.classify import classify
from aoft_demo.actions.residents import residents
from aoft_demo.actions.skill_cards import skill_card
from aoft_demo.tasks.session import Session
from aoft_demo.tasks.session_registry import SessionRegistry
from aoft_demo.views import notices
from aoft_demo.views.ask import cards
from aoft_demo.views.ask.picture import identity, payload, picture_field
from aoft_demo.views.failures import show_failures
from aoft_demo.views.view import View

__all__ = ["REMOVE_OLD_ANSWERS", "AskView", "ask_view"]

START = cards.for_picture(
    notices.empty("Choose a picture", "Upload one, take one or paste one."), ""
)

REMOVE_OLD_ANSWERS = f"""(picture, html) => {{
    const marked = /data-picture="([^"]*)"/.exec(html ?? "");
    const shown = !picture ? "" : picture.path
        ? picture.path.split("/").slice(-2, -1)[0] : `example-${{picture.example}}`;
    if (!marked || marked[1] === shown) return html;
    return picture ? {json.dumps(notices.busy("Asking all skills …"))} : {json.dumps(START)};
}}"""
"""JavaScript: replace answers that belong to another picture, without a request."""


@dataclass(frozen=True)
class AskView:
    """The picture, which other views use too, and the view.

    Attributes:
        picture: The picture, as a component; handlers get its path.
        view: The view.
    """

    picture: Any
    view: View


def ask_view(sessions: SessionRegistry) -> AskView:
    """Lay out the view and connect its events."""
    pictures: Sequence[Path] = sessions.shared.examples
    with gr.Row(elem_id="ask", equal_height=False):
        with gr.Column(scale=5, min_width=300):
            picture = picture_field(pictures)
        with gr.Column(scale=8, min_width=300):
            answers = gr.HTML(START, elem_id="answers", js_on_load=None, apply_default_css=False)

    def answered(session: Session, path: str | None) -> str:
        if path is None:
            return START
        return cards.for_picture(classified(session, Path(path)), identity(Path(path), pictures))

    @show_failures("No answer")
    def classified(session: Session, file: Path) -> str:
        tasks = residents(session)
        names = [task.name for task in tasks if task.name in session.on]
        if not tasks:
            return notices.empty("No skill yet", "Add one on the tab Skills, or teach one.")
        if not names:
            return notices.empty("No skill is on", "Switch one on on the tab Skills.")
        found = classify(session, file, names)
        own = sum(task.bytes for task in tasks)
        backbone = session.shared.backbone_bytes
        saved = (len(tasks) * backbone + own) / (backbone + own)
        about = {name: skill_card(session, name) for name in names}
        return cards.answer_cards(found, about, session.shared.difference, saved)

    def answer(path: str | None, request: gr.Request) -> str:
        session = sessions.get(request.session_hash)
        session.picture = Path(path) if path else None
        return answered(session, path)

    gr.on(  # before the next event: the browser runs an event's listeners one after the other
        [picture.change, answers.change],
        None,
        [picture, answers],
        answers,
        js=REMOVE_OLD_ANSWERS,
        show_progress="hidden",
        api_visibility="private",
    )
    picture.change(
        answer,
        picture,
        answers,
        show_progress="hidden",
        trigger_mode="always_last",
        concurrency_limit=4,
        api_visibility="private",
    )

    def refresh(session: Session) -> list[Any]:
        shown = payload(session.picture, pictures)
        path = session.picture
        if shown is not None and "example" in shown:
            path = pictures[shown["example"]]
        return [shown, answered(session, str(path) if path else None)]

    return AskView(picture, View([], [picture, answers], refresh))
