"""The tab Inside: what training changed, and where the model looks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from aoft_demo.actions.inside import attention_map, insight, overlay
from aoft_demo.tasks.visitors import Visitors
from aoft_demo.views import cards, notices
from aoft_demo.views.choosers import chooser
from aoft_demo.views.failures import sentence, told
from aoft_deploy.errors import SettingError

__all__ = ["InsideTab", "inside_tab"]


NOTE = notices.note(
    "Shows the angles between the vectors of the matrices, how much each layer changed, and where "
    "the model looks in the picture of the tab Classify."
)

START = notices.empty("Nothing looked at yet", "Choose a task and press Look inside.")


@dataclass(frozen=True)
class InsideTab:
    """What the page needs of it.

    Attributes:
        task: Names to choose from.
    """

    task: gr.Dropdown


def inside_tab(visitors: Visitors, picture: gr.Image) -> InsideTab:
    """Lay out the tab and connect it.

    Args:
        visitors: Who is there.
        picture: The picture of the tab Classify, whose attention is shown.
    """
    names = list(visitors.stage.tasks)
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=240):
            with gr.Row():
                task = chooser(names, label="Task", elem_id="inside-task")
            look = gr.Button("Look inside", variant="primary", elem_id="look")
            attention = gr.HTML(NOTE, elem_id="attention")
        with gr.Column(scale=6, min_width=300):
            panel = gr.HTML(START, elem_id="inside")

    @told("Nothing to see", 0, of=2)
    def show(chosen: str | None, path: str | None, request: gr.Request) -> tuple[str, str]:
        if not chosen:
            raise SettingError("Choose a task to look into first.")
        visitor = visitors.of(request.session_hash)
        panel = cards.angle_cards(chosen, insight(visitor, chosen))
        source = Path(path) if path else next(iter(visitors.stage.examples), None)
        if source is None:
            return panel, notices.note("Give a picture on the tab Classify to see the attention.")
        try:
            grid = attention_map(visitor, chosen, source)
            seen = overlay(visitor, source, grid)
        except Exception as error:
            return panel, notices.note(sentence(error))
        return panel, cards.attention_card(chosen, seen, grid)

    look.click(
        show, [task, picture], [panel, attention], concurrency_limit=2, api_visibility="private"
    )
    for changed, stale, after in (
        (task, [panel, attention], [START, NOTE]),
        (picture, [attention], [NOTE]),
    ):
        changed.change(None, None, stale, js=f"() => {json.dumps(after)}", api_visibility="private")
    return InsideTab(task)
