"""The tab Classify: a picture, the tasks that are asked, their answers side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from aoft_demo.actions.classify import classify
from aoft_demo.tasks.visitors import Visitors
from aoft_demo.views import cards, notices
from aoft_demo.views.choosers import names_among
from aoft_demo.views.failures import told

__all__ = ["FIRST", "ClassifyTab", "classify_tab", "uploaded"]

FIRST = 6
"""Tasks that are chosen at the beginning."""

START = cards.of_picture(
    notices.empty(
        "Drop a picture, or pick an example",
        "Every chosen task answers about it at once, in one pass through the backbone.",
    ),
    "",
)

FRESH = f"""(picture, html) => {{
    const marked = /data-picture="([^"]*)"/.exec(html ?? "");
    const shown = picture ? picture.path.split("/").slice(-2, -1)[0] : "";
    if (!marked || marked[1] === shown) return html;
    return picture ? {json.dumps(notices.wait("Looking at the picture …"))} : {json.dumps(START)};
}}"""
"""Takes answers away whose picture is not there any more, in the browser, without delay."""


@dataclass(frozen=True)
class ClassifyTab:
    """What other tabs and the page need of it.

    Attributes:
        picture: The picture's file.
        tasks: The chosen tasks.
    """

    picture: gr.Image
    tasks: gr.CheckboxGroup


def uploaded(payload: Any) -> str | None:
    """The uploaded file itself: we read pictures ourselves, and say what is wrong with them.

    Gradio checks the place of files that call themselves uploaded; of others it is checked here.
    """
    if payload is None or payload.path is None:
        return None
    path, folder = Path(payload.path).resolve(), Path(gr.utils.get_upload_folder()).resolve()
    if not path.is_relative_to(folder):
        raise gr.Error("This picture was not uploaded.", print_exception=False)
    return str(path)


def classify_tab(visitors: Visitors) -> ClassifyTab:
    """Lay out the tab and connect it."""
    names = list(visitors.stage.tasks)
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
            picture.preprocess = uploaded  # type: ignore[method-assign]
            gallery = gr.Gallery(
                [str(path) for path in visitors.stage.examples],
                label="Examples",
                show_label=False,
                columns=12,
                allow_preview=False,
                object_fit="contain",
                elem_id="examples",
                buttons=[],
                interactive=False,
                visible=bool(visitors.stage.examples),
            )
            tasks = gr.CheckboxGroup(
                names,
                value=names[:FIRST],
                label="Tasks to ask",
                show_select_all=True,
                elem_id="tasks",
            )
            tasks.preprocess = names_among  # type: ignore[assignment, method-assign]
        with gr.Column(scale=6, min_width=300):
            answers = gr.HTML(START, elem_id="answers")

    def pick(event: gr.SelectData) -> str:
        return str(examples[int(event.index)])

    def answer(path: str | None, chosen: Sequence[str], request: gr.Request) -> str:
        if path is None:
            return START
        return cards.of_picture(about(Path(path), chosen, request), Path(path).parent.name)

    @told("No answer")
    def about(picture: Path, chosen: Sequence[str], request: gr.Request) -> str:
        if not chosen:
            return notices.empty("No task is chosen", "Tick one below the picture.")
        visitor = visitors.of(request.session_hash)
        known = [name for name in chosen if name in visitor.tasks]
        return cards.answer_cards(classify(visitor, picture, known))

    examples = [entry["image"]["path"] for entry in gallery.value or []]  # Gradio's own copies
    gallery.select(pick, outputs=picture, show_progress="hidden", api_visibility="private")
    gr.on(  # before the next: the browser waits for one listener after the other
        [picture.change, answers.change],
        None,
        [picture, answers],
        answers,
        js=FRESH,
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
    return ClassifyTab(picture, tasks)
