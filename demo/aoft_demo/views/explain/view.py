"""The view How it works: what training changed, and the model's attention to a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from aoft_demo.actions.analysis import analyse_task
from aoft_demo.actions.attention import attention_of
from aoft_demo.actions.changes import change_of
from aoft_demo.actions.evidence import accuracies, speeds
from aoft_demo.tasks.session import Session
from aoft_demo.tasks.session_registry import SessionRegistry
from aoft_demo.views import notices
from aoft_demo.views.explain import cards
from aoft_demo.views.explain.evidence import evidence_cards
from aoft_demo.views.failures import failure_message, show_failures
from aoft_demo.views.task_lists import chosen_task, refreshed_dropdown, task_dropdown
from aoft_demo.views.view import View

__all__ = ["explain_view"]

NOTE = notices.note("The picture is the one of the tab Ask, or else the first example.")

START = notices.empty(
    "No skill opened yet",
    "Choose a skill and press Look inside: where it looks in your picture, what training changed, "
    "and by how much.",
)

Cards = tuple[str, str]
"""HTML of the panel and of the attention."""


def explain_view(sessions: SessionRegistry, picture: gr.Image) -> View:
    """Lay out the view and connect its events.

    Args:
        sessions: All sessions.
        picture: The picture of the view Ask.
    """
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=280):
            task = task_dropdown(list(sessions.shared.tasks), label="Skill", elem_id="inside-task")
            look = gr.Button("Look inside", variant="primary", elem_id="look")
        with gr.Column(scale=7, min_width=300):
            attention = gr.HTML(NOTE, elem_id="attention")
    panel = gr.HTML(START, elem_id="inside")
    gr.HTML(evidence_cards(accuracies(), speeds()), elem_id="measured")

    @show_failures("Not analysed", output=0, outputs=2)
    def show(chosen: str | None, path: str | None, request: gr.Request) -> Iterator[Cards]:
        session = sessions.get(request.session_hash)
        chosen = chosen_task(session, chosen)
        yield notices.busy(f"Looking inside {chosen} …"), ""
        found = analyse_task(session, chosen), change_of(session, chosen)
        analysis = cards.inside_cards(chosen, *found)
        source = Path(path) if path else next(iter(sessions.shared.examples), None)
        if source is None:
            note = "Choose a picture on the tab Ask to see the attention to it."
            yield analysis, notices.note(note)
        else:
            yield analysis, _attention_card(session, chosen, source)

    look.click(
        show,
        [task, picture],
        [panel, attention],
        concurrency_limit=2,
        trigger_mode="always_last",
        show_progress="hidden",
        api_visibility="private",
    )
    for changed, outputs, values in (
        (task, [panel, attention], [START, NOTE]),
        (picture, [attention], [NOTE]),
    ):
        reset = f"() => {json.dumps(values)}"
        changed.change(None, None, outputs, js=reset, api_visibility="private")

    def refresh(session: Session, chosen: str | None) -> list[Any]:
        return [refreshed_dropdown(chosen, list(session.tasks))]

    return View([task], [task], refresh, task=task)


def _attention_card(session: Session, name: str, picture: Path) -> str:
    """The attention to a picture, or why it cannot be shown."""
    try:
        return cards.attention_card(name, attention_of(session, name, picture))
    except Exception as error:
        return notices.note(failure_message(error))
