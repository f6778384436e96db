"""The view Take home: one task as a verified, merged ONNX model with its manifest."""

from __future__ import annotations

from typing import Any

import gradio as gr

from aoft_demo.actions.export import export_task
from aoft_demo.tasks.session import Session
from aoft_demo.tasks.session_registry import SessionRegistry
from aoft_demo.views import notices
from aoft_demo.views.failures import show_failures
from aoft_demo.views.take_home import cards
from aoft_demo.views.task_lists import refreshed_dropdown, task_dropdown
from aoft_demo.views.view import View
from aoft_deploy.errors import SettingError

__all__ = ["take_home_view"]


def take_home_view(sessions: SessionRegistry) -> View:
    """Lay out the view and connect its events."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=300):
            task = task_dropdown(list(sessions.shared.tasks), label="Task", elem_id="export-task")
            uint8 = gr.Checkbox(
                label="Take pixels (uint8) instead of normalised values", elem_id="uint8"
            )
            export = gr.Button("Merge, verify and export", variant="primary", elem_id="export")
            files = gr.File(
                label="Download", interactive=False, visible=False, elem_id="files", height=110
            )
        with gr.Column(scale=6, min_width=300):
            panel = gr.HTML(
                notices.empty(
                    "Nothing exported yet",
                    "The task's parameters are folded into the backbone's weights. The exported "
                    "model is run and compared with the unmerged one before you can download it.",
                ),
                elem_id="exported",
            )

    @show_failures("Not exported", output=0, outputs=2)
    def run(chosen: str | None, pixels: bool, request: gr.Request) -> tuple[str, Any]:
        if not chosen:
            raise SettingError("Choose a task to export first.")
        exported = export_task(sessions.get(request.session_hash), chosen, uint8=pixels)
        paths = [str(exported.path), str(exported.manifest)]
        return cards.export_card(chosen, exported), gr.File(paths, visible=True)

    export.click(run, [task, uint8], [panel, files], concurrency_limit=1, api_visibility="private")

    def refresh(session: Session, chosen: str | None) -> list[Any]:
        return [refreshed_dropdown(chosen, list(session.tasks))]

    return View([task], [task], refresh, task=task)
