"""The tab Export: one task as a merged ONNX file, verified, with its manifest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr

from aoft_demo.tasks.visitors import Visitors
from aoft_demo.views import cards, notices
from aoft_demo.views.choosers import chooser
from aoft_demo.views.failures import told

if TYPE_CHECKING:
    pass
from aoft_demo.actions.export import export_task
from aoft_deploy.errors import SettingError

__all__ = ["ExportTab", "export_tab"]


@dataclass(frozen=True)
class ExportTab:
    """What the page needs of it.

    Attributes:
        task: Names to choose from.
    """

    task: gr.Dropdown


def export_tab(visitors: Visitors) -> ExportTab:
    """Lay out the tab and connect it."""
    names = list(visitors.stage.tasks)
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=300):
            task = chooser(names, label="Task", elem_id="export-task")
            uint8 = gr.Checkbox(
                label="Take pixels (uint8) instead of normalised numbers", elem_id="uint8"
            )
            write = gr.Button("Merge, verify and export", variant="primary", elem_id="export")
            files = gr.File(
                label="Download", interactive=False, visible=False, elem_id="files", height=110
            )
        with gr.Column(scale=6, min_width=300):
            panel = gr.HTML(
                notices.empty(
                    "Nothing exported yet",
                    "The task's numbers are folded into the backbone's weights. The file is run "
                    "and compared with the unmerged model before you get it.",
                ),
                elem_id="exported",
            )

    @told("Not exported", 0, of=2)
    def run(chosen: str | None, pixels: bool, request: gr.Request) -> tuple[str, Any]:
        if not chosen:
            raise SettingError("Choose a task to export first.")
        done = export_task(visitors.of(request.session_hash), chosen, uint8=pixels)
        paths = [str(done.path), str(done.manifest)]
        return cards.export_card(chosen, done), gr.File(paths, visible=True)

    write.click(run, [task, uint8], [panel, files], concurrency_limit=1, api_visibility="private")
    return ExportTab(task)
