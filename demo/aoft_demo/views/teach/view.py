"""The view Teach: a new skill from a few pictures, and its trial."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from aoft_demo.actions.classify import classify
from aoft_demo.actions.train import run_training, training_plan
from aoft_demo.actions.training_data import (
    MAX_CLASSES,
    MAX_PICTURES,
    Example,
    forget_pictures,
    keep_picture,
    write_pictures,
)
from aoft_demo.tasks.session import Session
from aoft_demo.tasks.session_registry import SessionRegistry
from aoft_demo.tasks.training_queue import Training, TrainingStoppedError
from aoft_demo.views import notices
from aoft_demo.views.failures import failure_message, show_failures
from aoft_demo.views.teach import cards
from aoft_demo.views.view import View
from aoft_deploy.errors import AoftError, SettingError

__all__ = ["teach_view"]

FOLDER = Path(__file__).parent

UPLOAD = re.compile(r"teach-[0-9a-f]{32}\.[a-z]{1,20}")
"""Names of the files that the page uploads here; nobody else knows them, so they can be deleted."""

MAX_REQUEST = 100
"""Pictures of one request."""

MAX_TEXT = 100 * MAX_CLASSES * MAX_PICTURES
"""Characters of the classes that the page sends."""

SCRIPTS = {
    "tiles": ("pictures", "sending", "panels", "tiles"),
    "trial": ("pictures", "trial"),
}
"""Scripts of each component, which share their functions."""

TILES = """<p class="lead">Show two to four kinds of things. Use the camera, files or drawings.</p>
<div class="tiles"><button type="button" class="more">+ Add a class</button></div>"""

TRIAL = """<section class="teach-card trial" hidden><h2>Try <b></b> now</h2>
<div class="row"><button type="button" class="main" aria-expanded="false">Camera</button>
<button type="button">Picture</button><button type="button" aria-expanded="false">Draw</button>
<input type="file" accept="image/*" aria-label="Picture to try" hidden></div>
<div class="now"><div class="stage"></div><div class="answer"></div></div></section>"""

Outputs = tuple[Any, ...]
"""Values of the panel, the download, the name and the trial."""


def teach_view(sessions: SessionRegistry) -> View:
    """Lay out the view and connect its events."""
    with gr.Row(equal_height=False, elem_id="teach"):
        with gr.Column(scale=6, min_width=300):
            tiles = _component("tiles", TILES)
        with gr.Column(scale=5, min_width=300):
            with gr.Row(elem_id="teach-bar", equal_height=True):
                name = gr.Textbox(
                    "My skill", label="Name of the skill", max_length=40, elem_id="train-name"
                )
                teach = gr.Button("Teach", variant="primary", elem_id="train", min_width=110)
                stop = gr.Button("Stop", elem_id="stop", min_width=110)
            panel = gr.HTML(
                notices.empty(
                    "No skill taught yet",
                    "Teaching takes about half a minute. You can try the new skill at once, and "
                    "take it home as a file.",
                ),
                elem_id="curve",
            )
            file = gr.DownloadButton("Download model.ckpt", visible=False, elem_id="trained")
            trial = _component("trial", TRIAL)
    classes = gr.Textbox(visible=False, elem_id="classes")

    def keep(event: gr.EventData, request: gr.Request) -> str:
        session = sessions.get(request.session_hash)
        sessions.queue.trainers.prepare()
        return _keep(session, event._data)

    def attempt(event: gr.EventData, request: gr.Request) -> str:
        return _attempt(sessions.get(request.session_hash), event._data)

    @show_failures("Not taught", output=0, outputs=4)
    def run(typed: str | None, chosen: str | None, request: gr.Request) -> Iterator[Outputs]:
        session, unchanged = sessions.get(request.session_hash), (gr.skip(), gr.skip(), gr.skip())
        typed, wanted = typed or "", _classes(chosen or "")
        try:
            with session.training(typed) as training, sessions.queue.entered(training):
                shown = 0
                while before := sessions.queue.before(training):
                    training.check_not_stopped()
                    if before != shown:
                        shown = before
                        yield cards.waiting_card(before), *unchanged
                    time.sleep(0.1)
                yield from _train(sessions, session, training, typed, wanted)
        except TrainingStoppedError as error:
            yield notices.empty("Stopped", str(error)), *unchanged

    def stop_trainings(request: gr.Request) -> None:
        sessions.get(request.session_hash).stop_trainings()

    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    many: dict[str, Any] = {"trigger_mode": "multiple", "concurrency_limit": 4, **private}
    tiles.pictures(keep, None, tiles, **many)
    trial.attempt(attempt, None, trial, **many)
    taught = teach.click(
        run,
        [name, classes],
        [panel, file, name, trial],
        js="async (name) => [name, await window.aoftClasses()]",
        concurrency_limit=None,  # our own queue orders them, and can stop one that waits
        **private,
    )
    stop.click(stop_trainings, **private)
    return View(changes=[taught])


def _component(name: str, template: str) -> gr.HTML:
    """A part of the page with its own script, which sends events and receives answers as value."""
    script = "\n".join((FOLDER / f"{file}.js").read_text("utf-8") for file in SCRIPTS[name])
    return gr.HTML(
        "",
        html_template=template,
        js_on_load=script,
        apply_default_css=False,
        elem_id=f"teach-{name}",
    )


def _keep(session: Session, data: Any) -> str:
    """Keep uploaded pictures and delete others.

    Args:
        session: Session that keeps the pictures.
        data: The event's data: ``number``, ``add`` with ``id``, ``path`` and ``name`` of each
            picture, and ``remove`` with names of pictures.

    Returns:
        JSON with ``number``, the names ``kept``, and a sentence for each name ``refused``.
    """
    kept: list[str] = []
    refused: dict[str, str] = {}
    found = data if isinstance(data, dict) else {}
    for picture in _dictionaries(found.get("add"))[:MAX_REQUEST]:
        id, name = str(picture.get("id")), str(picture.get("name"))[:200]
        path = None
        try:
            path = _uploaded(picture.get("path"))
            keep_picture(session.folder, path, id, name)
            kept.append(id)
        except Exception as error:
            refused[id] = failure_message(error)
        finally:
            if path is not None:
                path.unlink(missing_ok=True)
    try:
        names = found.get("remove")
        if isinstance(names, list):
            forget_pictures(session.folder, map(str, names[: MAX_CLASSES * MAX_PICTURES]))
    except AoftError:
        pass  # a name that the page has never given
    return json.dumps({"number": found.get("number"), "kept": kept, "refused": refused})


def _attempt(session: Session, data: Any) -> str:
    """Answer a picture with the new skill; see ``_keep``."""
    found = data if isinstance(data, dict) else {}
    path, name = None, str(found.get("name"))[:200]
    try:
        path = _uploaded(found.get("path"))
        skill = str(found.get("skill"))
        answers = classify(session, path, [skill]).predictions[skill]
        html = cards.answer_card(skill, answers)
    except Exception as error:
        text = failure_message(error)
        html = notices.failure("No answer", text.replace(path.name, name) if path else text)
    finally:
        if path is not None:
            path.unlink(missing_ok=True)
    return json.dumps({"number": found.get("number"), "html": html})


def _uploaded(given: Any) -> Path:
    """The path of a file that the page has uploaded for this view.

    Raises:
        SettingError: The file was not uploaded by this view.
    """
    if isinstance(given, str) and len(given) < 4096 and "\0" not in given:
        path, folder = Path(given).resolve(), Path(gr.utils.get_upload_folder()).resolve()
        known = path.is_relative_to(folder) and UPLOAD.fullmatch(path.name)
        if known and path.is_file():
            return path
    raise SettingError("This picture was not uploaded: add it again.")


def _classes(text: str) -> list[tuple[str, list[Example]]]:
    """The classes that the page sends.

    Raises:
        SettingError: The text is not what the page sends.
    """
    try:
        if len(text) > MAX_TEXT:
            raise ValueError("The text is too long.")
        classes = [
            (str(entry["name"]), [Example(str(id), int(burst)) for id, burst in entry["pictures"]])
            for entry in json.loads(text)
        ]
    except (TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
        raise SettingError("The page has sent something else than classes: reload it.") from error
    ids = [example.id for _, examples in classes for example in examples]
    if len(set(ids)) != len(ids):
        raise SettingError("A picture is in two classes: reload the page.")
    return classes


def _dictionaries(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _train(
    sessions: SessionRegistry,
    session: Session,
    training: Training,
    typed: str,
    classes: list[tuple[str, list[Example]]],
) -> Iterator[Outputs]:
    """Write the pictures, train, and add the task; yield what the page shows."""
    folder = Path(tempfile.mkdtemp(prefix="training-", dir=session.folder))
    name = " ".join(typed.split())
    keep = gr.skip(), gr.skip(), gr.skip()
    try:
        yield cards.progress_card(name, None), *keep
        data, out = folder / "data", folder / "run"
        write_pictures(session.folder, classes, data, training.check_not_stopped)
        plan = training_plan(session.shared, data)
        for progress in run_training(plan, data, out, training, sessions.queue.trainers):
            if progress.checkpoint is None:
                yield cards.progress_card(name, progress), *keep
                continue
            name, task = session.add_trained(training, progress.checkpoint)
            download = gr.DownloadButton(value=str(task.checkpoint), visible=True)
            ready = json.dumps({"skill": name})
            yield cards.result_card(name, progress), download, _next_name(session, name), ready
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _next_name(session: Session, name: str) -> str:
    """A name for the next skill that no task has."""
    stem = re.sub(r" \d+$", "", name)[:36]
    return next(text for i in itertools.count(2) if (text := f"{stem} {i}") not in session.tasks)
