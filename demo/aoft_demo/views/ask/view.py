"""The view Ask: a picture, the chosen tasks, and their answers side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from aoft_demo.actions.classify import classify
from aoft_demo.tasks.session import Session
from aoft_demo.tasks.session_registry import SessionRegistry
from aoft_demo.views import notices
from aoft_demo.views.ask import cards
from aoft_demo.views.failures import show_failures
from aoft_demo.views.task_lists import valid_names
from aoft_demo.views.view import View

__all__ = ["FIRST", "REMOVE_OLD_ANSWERS", "AskView", "ask_view"]

FIRST = 6
"""Number of tasks that are chosen at first."""

START = cards.for_picture(
    notices.empty(
        "Drop a picture, or pick an example",
        "All chosen tasks classify it in one pass through the backbone.",
    ),
    "",
)

REMOVE_OLD_ANSWERS = f"""(picture, html) => {{
    const marked = /data-picture="([^"]*)"/.exec(html ?? "");
    const shown = picture ? picture.path.split("/").slice(-2, -1)[0] : "";
    if (!marked || marked[1] === shown) return html;
    return picture ? {json.dumps(notices.busy("Classifying the picture …"))} : {json.dumps(START)};
}}"""
"""JavaScript: replace answers that belong to another picture, without a request."""


@dataclass(frozen=True)
class AskView:
    """The picture, which other views use too, and the view.

    Attributes:
        picture: The picture.
        view: The view.
    """

    picture: gr.Image
    view: View


def ask_view(sessions: SessionRegistry) -> AskView:
    """Lay out the view and connect its events."""
    names, pictures = list(sessions.shared.tasks), list(sessions.shared.examples)
    with gr.Row(elem_id="classify", equal_height=False):
        with gr.Column(scale=5, min_width=300):
            picture = gr.Image(
                label="Picture",
                type="filepath",
                sources=["upload", "webcam", "clipboard"],
                height=250,
                elem_id="picture",
                buttons=[],
            )
            picture.preprocess = _uploaded_path  # type: ignore[method-assign]
            gallery = gr.Gallery(
                [str(path) for path in pictures],
                label="Examples",
                show_label=False,
                columns=12,
                allow_preview=False,
                object_fit="contain",
                elem_id="examples",
                buttons=[],
                interactive=False,
                visible=bool(pictures),
            )
            tasks = gr.CheckboxGroup(
                names,
                value=names[:FIRST],
                label="Tasks",
                show_select_all=True,
                elem_id="tasks",
            )
            tasks.preprocess = valid_names  # type: ignore[assignment, method-assign]
        with gr.Column(scale=6, min_width=300):
            answers = gr.HTML(START, elem_id="answers")

    examples = [entry["image"]["path"] for entry in gallery.value or []]  # Gradio's own copies

    def pick_example(event: gr.SelectData) -> str:
        return str(examples[int(event.index)])

    def answer(path: str | None, chosen: Sequence[str], request: gr.Request) -> str:
        if path is None:
            return START
        html = classified(Path(path), chosen, request)
        return cards.for_picture(html, Path(path).parent.name)

    @show_failures("No answer")
    def classified(file: Path, chosen: Sequence[str], request: gr.Request) -> str:
        if not chosen:
            return notices.empty("No task is chosen", "Choose at least one below the picture.")
        session = sessions.get(request.session_hash)
        known = [name for name in chosen if name in session.tasks]
        return cards.answer_cards(classify(session, file, known))

    gallery.select(pick_example, outputs=picture, show_progress="hidden", api_visibility="private")
    gr.on(  # before the next event: the browser runs an event's listeners one after the other
        [picture.change, answers.change],
        None,
        [picture, answers],
        answers,
        js=REMOVE_OLD_ANSWERS,
        show_progress="hidden",
        api_visibility="private",
    )
    gr.on(
        [picture.change, tasks.change],
        answer,
        [picture, tasks],
        answers,
        show_progress="hidden",
        trigger_mode="always_last",
        concurrency_limit=4,
        api_visibility="private",
    )

    def refresh(session: Session, chosen: Sequence[str]) -> list[Any]:
        return [gr.CheckboxGroup(list(session.tasks), value=_chosen(session, chosen))]

    return AskView(picture, View([tasks], [tasks], refresh))


def _chosen(session: Session, chosen: Sequence[str]) -> list[str]:
    """Tasks to choose after a change: those chosen before, and new ones; at first the first few."""
    names = list(session.tasks)
    if session.displayed is None:
        also = set(names[:FIRST])
    else:
        also = set(names) - session.displayed
    session.displayed = set(names)
    return [name for name in names if name in also.union(chosen)]


def _uploaded_path(payload: Any) -> str | None:
    """The path of the uploaded file, in place of Gradio's own decoding.

    Gradio checks the paths of files that are marked as uploaded; this checks all others.
    """
    if payload is None or payload.path is None:
        return None
    path, folder = Path(payload.path).resolve(), Path(gr.utils.get_upload_folder()).resolve()
    if not path.is_relative_to(folder):
        raise gr.Error("This picture was not uploaded.", print_exception=False)
    return str(path)
