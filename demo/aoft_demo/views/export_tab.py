"""The tab Export: one task as a merged ONNX file, verified, with its manifest."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr

from aoft_demo.tasks.shared_fleet import checkpoint_of
from aoft_demo.tasks.visitors import Visitor, Visitors
from aoft_demo.views import cards
from aoft_demo.views.choosers import chooser
from aoft_demo.views.failures import told

if TYPE_CHECKING:
    from aoft_deploy.export.merged import Exported
from aoft_deploy.errors import SettingError

__all__ = ["ExportTab", "export_tab", "export_task"]


@dataclass(frozen=True)
class ExportTab:
    """What the page needs of it.

    Attributes:
        task: Names to choose from.
    """

    task: gr.Dropdown


def export_task(visitor: Visitor, name: str, *, uint8: bool) -> Exported:
    """A task's merged model with its manifest, among the visitor's files.

    Raises:
        AoftError: The task has no checkpoint, it was removed meanwhile, or its answers would
            differ.
    """
    from aoft_deploy.export.merged import export_merged

    folder = visitor.folder / "exports"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with visitor.using(name) as task:
            return export_merged(
                checkpoint_of(task, name),
                folder / f"{name}.onnx",
                uint8=uint8,
                weights=visitor.stage.weights,
                command=["aoft-export", "--merge", f"{name}.ckpt", *(["--uint8"] * uint8)],
            )
    finally:
        if visitor.gone:  # its folder was removed while we wrote into it
            shutil.rmtree(visitor.folder, ignore_errors=True)


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
                cards.empty(
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
