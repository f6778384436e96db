"""The tab Swap: tasks come and go while the page runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from aoft_demo.actions.swap import residents, verify
from aoft_demo.tasks.visitors import Visitors
from aoft_demo.views import cards, notices
from aoft_demo.views.choosers import chooser
from aoft_demo.views.failures import told
from aoft_deploy.checkpoints.names import task_name
from aoft_deploy.errors import CheckpointError, SettingError

__all__ = ["SwapTab", "resident_panel", "swap_tab"]


@dataclass(frozen=True)
class SwapTab:
    """What the page needs of it.

    Attributes:
        resident: The table of tasks.
        remove: Names to remove.
        check: Names to verify.
        changes: Events after which there are other tasks.
    """

    resident: gr.HTML
    remove: gr.Dropdown
    check: gr.Dropdown
    changes: list[Any]


def swap_tab(visitors: Visitors) -> SwapTab:
    """Lay out the tab and connect it."""
    stage = visitors.stage
    names = list(stage.tasks)
    with gr.Row(elem_id="swap", equal_height=False):
        with gr.Column(scale=5, min_width=300):
            upload = gr.File(
                label="Add a task: its model.ckpt",
                file_types=[".ckpt", ".safetensors"],
                height=120,
                elem_id="upload",
            )
            with gr.Row(equal_height=True):
                name = gr.Textbox(
                    label="Name", placeholder="the file's", max_length=40, elem_id="name", scale=3
                )
                add = gr.Button("Add", variant="primary", elem_id="add", scale=1, min_width=90)
            with gr.Row(equal_height=True):
                remove = chooser(names, label="Remove a task", elem_id="remove-name", scale=3)
                drop = gr.Button("Remove", elem_id="remove", scale=1, min_width=90)
            with gr.Row(equal_height=True):
                check = chooser(names, label="Verify a task", elem_id="verify-name", scale=3)
                prove = gr.Button("Verify", elem_id="verify", scale=1, min_width=90)
            verdict = gr.HTML(
                notices.note(
                    "Verify compares three ways to the same answers: the model before any merge, "
                    "the merged one, and this fleet."
                ),
                elem_id="verdict",
            )
        with gr.Column(scale=6, min_width=300):
            resident = gr.HTML(elem_id="resident")

    @told("Not added", 2, of=3)
    def add_task(path: str | None, typed: str, request: gr.Request) -> tuple[None, str, str]:
        if path is None:
            raise CheckpointError("Choose a model.ckpt first: drop it on the field above.")
        visitor = visitors.of(request.session_hash)
        file = Path(path)
        chosen = typed.strip() or (file.stem if file.name == "model.ckpt" else task_name(file))
        task = visitor.add(file, chosen)
        where = notices.done(chosen, f"joined the fleet with {len(task.classes)} classes.")
        return None, "", where

    @told("Not removed")
    def remove_task(chosen: str | None, request: gr.Request) -> str:
        if not chosen:
            raise SettingError("Choose a task to remove first.")
        visitors.of(request.session_hash).remove(chosen)
        return notices.done(chosen, "has left; its room is free again.")

    @told("Not verified")
    def verify_task(chosen: str | None, request: gr.Request) -> str:
        if not chosen:
            raise SettingError("Choose a task to verify first.")
        visitor = visitors.of(request.session_hash)
        return cards.agreement_card(chosen, verify(visitor, chosen))

    plain: dict[str, Any] = {"api_visibility": "private"}
    quick = {**plain, "show_progress": "hidden"}
    added = add.click(add_task, [upload, name], [upload, name, verdict], **quick)
    removed = drop.click(remove_task, remove, verdict, **quick)
    prove.click(verify_task, check, verdict, concurrency_limit=2, **plain)
    return SwapTab(resident, remove, check, [added, removed])


def resident_panel(visitors: Visitors, session: str | None) -> str:
    """The table of a visitor's tasks."""
    return cards.resident_card(visitors.stage, residents(visitors.of(session)))
