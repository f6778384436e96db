"""The tab Train: a task from a few pictures, which joins the fleet."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from aoft_demo.actions import train as actions
from aoft_demo.tasks.training_queue import Training
from aoft_demo.tasks.visitors import Visitor, Visitors
from aoft_demo.views import cards, notices
from aoft_demo.views.failures import told
from aoft_deploy.data.synthetic import task_names

__all__ = ["TrainTab", "train_tab"]

DRAWN, OWN = "Drawn for you", "My pictures"

CLASSES = 4


@dataclass(frozen=True)
class TrainTab:
    """What the page needs of it.

    Attributes:
        changes: Events after which there are other tasks.
    """

    changes: list[Any]


def train_tab(visitors: Visitors) -> TrainTab:
    """Lay out the tab and connect it."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=300):
            source = gr.Radio([DRAWN, OWN], value=DRAWN, label="Pictures", elem_id="source")
            with gr.Group(visible=True) as drawn:
                with gr.Row():
                    kind = gr.Dropdown(
                        list(task_names()), value="shape", label="Of", elem_id="kind", scale=2
                    )
                    count = gr.Slider(
                        60, 800, 300, step=20, label="How many", elem_id="count", scale=3
                    )
            rows: list[gr.Textbox | gr.File] = []
            with gr.Group(visible=False, elem_id="classes") as own:
                for number in range(1, CLASSES + 1):
                    with gr.Row():
                        rows.append(
                            gr.Textbox(
                                label=f"Class {number}",
                                placeholder="a name" if number < 3 else "may stay empty",
                                max_length=40,
                                elem_id=f"class-{number}",
                                scale=2,
                                min_width=110,
                            )
                        )
                        rows.append(
                            gr.File(
                                label="its pictures, 3 or more",
                                file_count="multiple",
                                file_types=["image"],
                                height=84,
                                elem_id=f"pictures-{number}",
                                scale=3,
                                min_width=150,
                            )
                        )
            with gr.Row():
                name = gr.Textbox(
                    "my task", label="Name of the task", max_length=40, elem_id="train-name"
                )
                effort = gr.Radio(
                    list(actions.EFFORTS), value="normal", label="Effort", elem_id="effort"
                )
            with gr.Row():
                train = gr.Button("Train", variant="primary", elem_id="train", scale=2)
                stop = gr.Button("Stop", elem_id="stop", scale=1, min_width=90)
        with gr.Column(scale=6, min_width=300):
            panel = gr.HTML(
                notices.empty(
                    "No training yet",
                    "It takes about a minute on two cores. The new task joins the fleet when it "
                    "is done, and its checkpoint can be downloaded here.",
                ),
                elem_id="curve",
            )
            file = gr.File(label="Checkpoint", interactive=False, visible=False, elem_id="trained")

    @told("Not trained", 0, of=2)
    def work(
        where: str,
        chosen: str,
        number: float,
        typed: str,
        how: str,
        *more: Any,
    ) -> Iterator[tuple[Any, ...]]:
        *given, request = more  # an annotation, which *more cannot have, would bring the request
        visitor = visitors.of(request.session_hash)
        with visitor.training(typed) as training, visitors.line.place(training):
            if not visitors.line.is_first(training):
                yield notices.wait("Another training runs; yours begins when it ends …"), gr.skip()
            while not visitors.line.is_first(training):
                training.go_on()
                time.sleep(0.1)
            pairs = list(zip(given[::2], given[1::2], strict=True))
            groups = [(text, [Path(f) for f in files or []]) for text, files in pairs]

            def write(data: Path) -> None:
                if where == DRAWN:
                    actions.write_task(chosen, int(number), len(visitor.tasks), data)
                else:
                    actions.write_pictures(groups, data, training.go_on)

            yield from steps(visitor, training, write, how)

    def steps(
        visitor: Visitor, training: Training, write: Callable[[Path], None], how: str
    ) -> Iterator[tuple[Any, ...]]:
        folder = Path(tempfile.mkdtemp(prefix="training-", dir=visitor.folder))
        try:
            yield notices.wait("Preparing the pictures …"), gr.skip()
            data, out = folder / "data", folder / "run"
            write(data)
            arguments, epochs = actions.plan(visitors.stage, data, out, how)
            yield notices.wait("Starting to train …"), gr.File(visible=False)
            for step in actions.run(arguments, out, epochs, training):
                if step.checkpoint is not None:
                    name, task = visitor.add_trained(training, step.checkpoint)
                    kept = gr.File(str(task.checkpoint), visible=True)
                    text = notices.done(name, "is trained and has joined the fleet.")
                    yield text + cards.training_card(step), kept
                elif step.lines:
                    yield cards.training_card(step), gr.skip()
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def halt(request: gr.Request) -> None:
        visitors.of(request.session_hash).stop_trainings()

    def choose(where: str) -> tuple[Any, Any]:
        return gr.Group(visible=where == DRAWN), gr.Group(visible=where == OWN)

    def begin(
        where: str,
        chosen: str,
        number: float,
        typed: str,
        how: str,
        n1: str,
        f1: Any,
        n2: str,
        f2: Any,
        n3: str,
        f3: Any,
        n4: str,
        f4: Any,
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:
        classes = (n1, f1, n2, f2, n3, f3, n4, f4)
        yield from work(where, chosen, number, typed, how, *classes, request)

    plain: dict[str, Any] = {"api_visibility": "private"}
    source.change(choose, source, [drawn, own], show_progress="hidden", **plain)
    trained = train.click(
        begin,
        [source, kind, count, name, effort, *rows],
        [panel, file],
        concurrency_limit=None,  # they take turns, and can be stopped before theirs
        show_progress="minimal",
        **plain,
    )
    stop.click(halt, show_progress="hidden", **plain)
    return TrainTab([trained])
