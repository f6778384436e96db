"""The page: its tabs, and what follows when a visitor's tasks change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from aoft_demo.actions.evidence import accuracies, speeds
from aoft_demo.actions.swap import residents
from aoft_demo.tasks.visitors import Visitors
from aoft_demo.views import cards
from aoft_demo.views.choosers import refreshed
from aoft_demo.views.classify_tab import FIRST, classify_tab
from aoft_demo.views.export_tab import export_tab
from aoft_demo.views.failures import sentence
from aoft_demo.views.inside_tab import inside_tab
from aoft_demo.views.swap_tab import resident_panel, swap_tab
from aoft_demo.views.train_tab import train_tab

__all__ = ["Page", "build"]


class Page(gr.Blocks):
    """Blocks that tell each fault of a handler as a message on the page.

    Most handlers show their faults where their results would be. This is for what happens before
    and after them, such as a file that Gradio does not take, and for those with nothing to show.
    """

    async def process_api(self, *arguments: Any, **more: Any) -> dict[str, Any]:
        """Run an event's handler; see ``gradio.Blocks``."""
        try:
            return await super().process_api(*arguments, **more)
        except gr.Error:
            raise
        except Exception as error:
            raise gr.Error(sentence(error), print_exception=False) from error


def build(visitors: Visitors) -> gr.Blocks:
    """The whole page."""
    stage = visitors.stage
    page = Page(
        title="aoft-demo", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True
    )
    with page:
        head = gr.HTML(cards.header(stage, []), elem_id="head")
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Classify", id="classify"):
                classify = classify_tab(visitors)
            with gr.Tab("Swap", id="swap"):
                swap = swap_tab(visitors)
            with gr.Tab("Inside", id="inside"):
                inside = inside_tab(visitors, classify.picture)
            with gr.Tab("Train", id="train"):
                train = train_tab(visitors)
            with gr.Tab("Export", id="export"):
                export = export_tab(visitors)
            with gr.Tab("Evidence", id="evidence"):
                gr.HTML(cards.evidence_cards(accuracies(), speeds()), elem_id="measured")
        choosers = [swap.remove, swap.check, inside.task, export.task]

        def refresh(
            chosen: Sequence[str],
            removed: str | None,
            checked: str | None,
            looked: str | None,
            exported: str | None,
            request: gr.Request,
        ) -> list[Any]:
            visitor = visitors.of(request.session_hash)
            names = list(visitor.tasks)
            new = set(names) - visitor.shown if visitor.shown is not None else set()
            begins = names[:FIRST] if visitor.shown is None else []
            visitor.shown = set(names)
            ticked = [name for name in names if name in new.union(chosen, begins)]
            before = (removed, checked, looked, exported)
            return [
                cards.header(stage, residents(visitor)),
                resident_panel(visitors, request.session_hash),
                gr.CheckboxGroup(names, value=ticked),
                *(refreshed(one, names) for one in before),
            ]

        def leave(request: gr.Request) -> None:
            visitors.leave(request.session_hash)

        inputs = [classify.tasks, *choosers]
        outputs = [head, swap.resident, *inputs]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        page.load(refresh, inputs, outputs, **quiet)
        for event in (*swap.changes, *train.changes):
            event.success(refresh, inputs, outputs, **quiet)
        page.unload(leave)
    return page
