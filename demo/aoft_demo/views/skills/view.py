"""The view Skills: add, remove and verify tasks while the fleet runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from aoft_demo.actions.residents import residents
from aoft_demo.actions.verification import verify
from aoft_demo.tasks.session import Session
from aoft_demo.tasks.session_registry import SessionRegistry
from aoft_demo.views import notices
from aoft_demo.views.failures import show_failures
from aoft_demo.views.skills import cards
from aoft_demo.views.task_lists import refreshed_dropdown, task_dropdown
from aoft_demo.views.view import View
from aoft_deploy.checkpoints.names import task_name
from aoft_deploy.errors import CheckpointError, SettingError

__all__ = ["skills_view"]


def skills_view(sessions: SessionRegistry) -> View:
    """Lay out the view and connect its events."""
    names = list(sessions.shared.tasks)
    with gr.Row(elem_id="swap", equal_height=False):
        with gr.Column(scale=5, min_width=300):
            upload = gr.File(
                label="Add a task from its model.ckpt",
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
                to_remove = task_dropdown(
                    names, label="Remove a task", elem_id="remove-name", scale=3
                )
                remove = gr.Button("Remove", elem_id="remove", scale=1, min_width=90)
            with gr.Row(equal_height=True):
                to_verify = task_dropdown(
                    names, label="Verify a task", elem_id="verify-name", scale=3
                )
                check = gr.Button("Verify", elem_id="verify", scale=1, min_width=90)
            verdict = gr.HTML(
                notices.note(
                    "Verify compares a task's answers from the unmerged model, the merged model "
                    "and this fleet."
                ),
                elem_id="verdict",
            )
        with gr.Column(scale=6, min_width=300):
            resident = gr.HTML(elem_id="resident")

    @show_failures("Not added", output=2, outputs=3)
    def add_task(path: str | None, typed: str, request: gr.Request) -> tuple[None, str, str]:
        if path is None:
            raise CheckpointError("Choose a model.ckpt first: drop it on the field above.")
        file = Path(path)
        chosen = typed.strip() or (file.stem if file.name == "model.ckpt" else task_name(file))
        task = sessions.get(request.session_hash).add(file, chosen)
        message = f"joined the fleet with {len(task.classes)} classes."
        return None, "", notices.success(chosen, message)

    @show_failures("Not removed")
    def remove_task(chosen: str | None, request: gr.Request) -> str:
        if not chosen:
            raise SettingError("Choose a task to remove first.")
        sessions.get(request.session_hash).remove(chosen)
        return notices.success(chosen, "was removed.")

    @show_failures("Not verified")
    def verify_task(chosen: str | None, request: gr.Request) -> str:
        if not chosen:
            raise SettingError("Choose a task to verify first.")
        session = sessions.get(request.session_hash)
        return cards.agreement_card(chosen, verify(session, chosen))

    private: dict[str, Any] = {"api_visibility": "private"}
    quick = {**private, "show_progress": "hidden"}
    added = add.click(add_task, [upload, name], [upload, name, verdict], **quick)
    removed = remove.click(remove_task, to_remove, verdict, **quick)
    check.click(verify_task, to_verify, verdict, concurrency_limit=2, **private)

    def refresh(session: Session, *chosen: str | None) -> list[Any]:
        names = list(session.tasks)
        table = cards.resident_card(sessions.shared, residents(session))
        return [table, *(refreshed_dropdown(name, names) for name in chosen)]

    dropdowns = [to_remove, to_verify]
    return View(dropdowns, [resident, *dropdowns], refresh, [added, removed])
