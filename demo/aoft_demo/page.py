"""The page: its tabs, and what follows when a visitor's tasks change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from aoft_demo import cards
from aoft_demo.classify_tab import FIRST, classify_tab
from aoft_demo.evidence import accuracies, speeds
from aoft_demo.export_tab import export_tab
from aoft_demo.inside_tab import inside_tab
from aoft_demo.swap import residents
from aoft_demo.swap_tab import resident_panel, swap_tab
from aoft_demo.train_tab import train_tab
from aoft_demo.visitors import Visitors

__all__ = ["build"]


def build(visitors: Visitors) -> gr.Blocks:
    """The whole page."""
    stage = visitors.stage
    page: gr.Blocks = gr.Blocks(
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

        def refresh(chosen: Sequence[str], request: gr.Request) -> list[Any]:
            visitor = visitors.of(request.session_hash)
            names = list(visitor.tasks)
            new = [name for name in names if name not in visitor.shown]
            if not visitor.shown:
                new = new[:FIRST]
            visitor.shown = set(names)
            ticked = [name for name in names if name in chosen or name in new]
            first = names[-1] if new and visitor.shown else (names[0] if names else None)
            return [
                cards.header(stage, residents(visitor)),
                resident_panel(visitors, request.session_hash),
                gr.CheckboxGroup(names, value=ticked),
                *(gr.Dropdown(names, value=first) for _ in choosers),
            ]

        def leave(request: gr.Request) -> None:
            visitors.leave(request.session_hash)

        outputs = [head, swap.resident, classify.tasks, *choosers]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        page.load(refresh, classify.tasks, outputs, **quiet)
        for event in (*swap.changes, *train.changes):
            event.success(refresh, classify.tasks, outputs, **quiet)
        page.unload(leave)
    return page
