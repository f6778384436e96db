"""The page: its tabs, and the updates after a session's tasks have changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from aoft_demo.actions.evidence import accuracies, speeds
from aoft_demo.actions.residents import residents
from aoft_demo.tasks.session import Session
from aoft_demo.tasks.session_registry import SessionRegistry
from aoft_demo.views import cards
from aoft_demo.views.classify_tab import FIRST, classify_tab
from aoft_demo.views.export_tab import export_tab
from aoft_demo.views.failures import failure_message
from aoft_demo.views.inside_tab import inside_tab
from aoft_demo.views.swap_tab import swap_tab
from aoft_demo.views.task_lists import refreshed_dropdown
from aoft_demo.views.train_tab import train_tab

__all__ = ["Page", "build"]


class Page(gr.Blocks):
    """Blocks that show every unexpected error of an event as a message.

    Most handlers show their errors in place of their results. This class covers the rest: errors
    before and after a handler, such as a file that Gradio does not serve, and handlers without an
    output.
    """

    async def process_api(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Run an event's handler; see ``gradio.Blocks``."""
        try:
            return await super().process_api(*arguments, **options)
        except gr.Error:
            raise
        except Exception as error:
            raise gr.Error(failure_message(error), print_exception=False) from error


def build(sessions: SessionRegistry) -> gr.Blocks:
    """Build the page."""
    page = Page(
        title="aoft-demo", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True
    )
    with page:
        header = gr.HTML(cards.header(sessions.shared, []), elem_id="head")
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Classify", id="classify"):
                classify = classify_tab(sessions)
            with gr.Tab("Swap", id="swap"):
                swap = swap_tab(sessions)
            with gr.Tab("Inside", id="inside"):
                inside = inside_tab(sessions, classify.picture)
            with gr.Tab("Train", id="train"):
                train = train_tab(sessions)
            with gr.Tab("Export", id="export"):
                export = export_tab(sessions)
            with gr.Tab("Evidence", id="evidence"):
                gr.HTML(cards.evidence_cards(accuracies(), speeds()), elem_id="measured")

        def refresh(
            request: gr.Request, chosen: Sequence[str], *dropdowns: str | None
        ) -> list[Any]:
            session = sessions.get(request.session_hash)
            tasks = residents(session)
            chosen = _chosen(session, chosen)
            names = list(session.tasks)
            return [
                cards.header(sessions.shared, tasks),
                cards.resident_card(sessions.shared, tasks),
                gr.CheckboxGroup(names, value=chosen),
                *(refreshed_dropdown(value, names) for value in dropdowns),
            ]

        def end_session(request: gr.Request) -> None:
            sessions.end(request.session_hash)

        inputs = [classify.tasks, swap.remove, swap.verify, inside.task, export.task]
        outputs = [header, swap.resident, *inputs]
        hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        page.load(refresh, inputs, outputs, **hidden)
        for event in (*swap.changes, *train.changes):
            event.success(refresh, inputs, outputs, **hidden)
        page.unload(end_session)
    return page


def _chosen(session: Session, chosen: Sequence[str]) -> list[str]:
    """Tasks to choose after a change: those chosen before, and new ones; at first the first few."""
    names = list(session.tasks)
    if session.displayed is None:
        also = set(names[:FIRST])
    else:
        also = set(names) - session.displayed
    session.displayed = set(names)
    return [name for name in names if name in also.union(chosen)]
