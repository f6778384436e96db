"""The view Teach: a new task from synthetic or uploaded pictures."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from aoft_demo.actions.train import EFFORTS, run_training, training_arguments
from aoft_demo.actions.training_data import write_synthetic_task, write_uploaded_pictures
from aoft_demo.tasks.session import Session
from aoft_demo.tasks.session_registry import SessionRegistry
from aoft_demo.tasks.training_queue import Training
from aoft_demo.views import notices
from aoft_demo.views.failures import show_failures
from aoft_demo.views.teach import cards
from aoft_demo.views.view import View
from aoft_deploy.data.synthetic import task_names

__all__ = ["SYNTHETIC", "UPLOADED", "teach_view"]

SYNTHETIC, UPLOADED = "Synthetic pictures", "My pictures"

CLASSES = 4

Outputs = tuple[Any, ...]
"""Values of the panel and of the file."""


def teach_view(sessions: SessionRegistry) -> View:
    """Lay out the view and connect its events."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=300):
            source = gr.Radio(
                [SYNTHETIC, UPLOADED], value=SYNTHETIC, label="Data", elem_id="source"
            )
            with gr.Group(visible=True) as synthetic, gr.Row():
                kind = gr.Dropdown(
                    list(task_names()), value="shape", label="Task", elem_id="kind", scale=2
                )
                count = gr.Slider(60, 800, 300, step=20, label="Pictures", elem_id="count", scale=3)
            with gr.Group(visible=False, elem_id="classes") as uploaded:
                classes = [part for number in range(CLASSES) for part in _class_row(number + 1)]
            with gr.Row():
                name = gr.Textbox(
                    "my task", label="Name of the new task", max_length=40, elem_id="train-name"
                )
                effort = gr.Radio(list(EFFORTS), value="normal", label="Effort", elem_id="effort")
            with gr.Row():
                train = gr.Button("Train", variant="primary", elem_id="train", scale=2)
                stop = gr.Button("Stop", elem_id="stop", scale=1, min_width=90)
        with gr.Column(scale=6, min_width=300):
            panel = gr.HTML(
                notices.empty(
                    "No training yet",
                    "Training takes about a minute on two cores. The new task then joins the "
                    "fleet, and you can download its checkpoint here.",
                ),
                elem_id="curve",
            )
            file = gr.File(label="Checkpoint", interactive=False, visible=False, elem_id="trained")

    @show_failures("Not trained", output=0, outputs=2)
    def run(
        request: gr.Request,
        chosen_source: str,
        chosen_kind: str,
        pictures: float,
        typed: str,
        chosen_effort: str,
        *uploads: Any,
    ) -> Iterator[Outputs]:
        session = sessions.get(request.session_hash)

        def write(data: Path) -> None:
            if chosen_source == SYNTHETIC:
                write_synthetic_task(chosen_kind, int(pictures), len(session.tasks), data)
            else:
                write_uploaded_pictures(_groups(uploads), data, training.check_not_stopped)

        with session.training(typed) as training, sessions.queue.entered(training):
            if not sessions.queue.is_first(training):
                yield notices.busy("Waiting for another training to finish …"), gr.skip()
            while not sessions.queue.is_first(training):
                training.check_not_stopped()
                time.sleep(0.1)
            yield from _train(session, training, write, chosen_effort)

    def stop_trainings(request: gr.Request) -> None:
        sessions.get(request.session_hash).stop_trainings()

    def show_source(chosen: str) -> tuple[Any, Any]:
        return gr.Group(visible=chosen == SYNTHETIC), gr.Group(visible=chosen == UPLOADED)

    private: dict[str, Any] = {"api_visibility": "private"}
    source.change(show_source, source, [synthetic, uploaded], show_progress="hidden", **private)
    trained = train.click(
        run,
        [source, kind, count, name, effort, *classes],
        [panel, file],
        concurrency_limit=None,  # our own queue orders them, and can stop one that waits
        show_progress="minimal",
        **private,
    )
    stop.click(stop_trainings, show_progress="hidden", **private)
    return View(changes=[trained])


def _class_row(number: int) -> tuple[gr.Textbox, gr.File]:
    """Fields for one class of uploaded pictures: its name and its files."""
    with gr.Row():
        name = gr.Textbox(
            label=f"Class {number}",
            placeholder="name" if number < 3 else "optional",
            max_length=40,
            elem_id=f"class-{number}",
            scale=2,
            min_width=110,
        )
        files = gr.File(
            label="Pictures, at least 3",
            file_count="multiple",
            file_types=["image"],
            height=84,
            elem_id=f"pictures-{number}",
            scale=3,
            min_width=150,
        )
    return name, files


def _groups(uploads: tuple[Any, ...]) -> list[tuple[str, list[Path]]]:
    """Names and files of the classes, from the values of all ``_class_row``."""
    pairs = zip(uploads[::2], uploads[1::2], strict=True)
    return [(name, [Path(file) for file in files or []]) for name, files in pairs]


def _train(
    session: Session, training: Training, write: Callable[[Path], None], effort: str
) -> Iterator[Outputs]:
    """Write the pictures, train, and add the task; yield what the page shows."""
    folder = Path(tempfile.mkdtemp(prefix="training-", dir=session.folder))
    try:
        yield notices.busy("Preparing the pictures …"), gr.skip()
        data, out = folder / "data", folder / "run"
        write(data)
        arguments, epochs = training_arguments(session.shared, data, out, effort)
        yield notices.busy("Starting the training …"), gr.File(visible=False)
        for progress in run_training(arguments, out, epochs, training):
            if progress.checkpoint is not None:
                name, task = session.add_trained(training, progress.checkpoint)
                message = notices.success(name, "is trained and has joined the fleet.")
                download = gr.File(str(task.checkpoint), visible=True)
                yield message + cards.training_card(progress), download
            elif progress.lines:
                yield cards.training_card(progress), gr.skip()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
