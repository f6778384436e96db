"""The view Race: one mixed batch against one model per skill and against PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gradio as gr

from aoft_demo.actions.race import PER_SKILL
from aoft_demo.actions.race_contestants import lora_rank
from aoft_demo.actions.race_following import follow_race
from aoft_demo.actions.race_queue import RaceQueue, RaceStoppedError
from aoft_demo.actions.race_stages import Standing
from aoft_demo.tasks.session_registry import SessionRegistry
from aoft_demo.views.failures import failure_message
from aoft_demo.views.parts import show_code
from aoft_demo.views.race import cards
from aoft_demo.views.race.picture import race_picture
from aoft_demo.views.race.snippets import python_snippet, shell_snippet
from aoft_demo.views.view import View

__all__ = ["race_view"]

SAVE_PICTURE = (Path(__file__).parent / "share.js").read_text("utf-8")
"""JavaScript of the panel."""

FOCUS_START = '() => document.querySelector("#race-start").focus()'
"""JavaScript: the button Stop disappears, so the focus moves to Start."""


def race_view(sessions: SessionRegistry, picture: gr.Image) -> View:
    """Lay out the view and connect its events.

    Args:
        sessions: All sessions.
        picture: The picture of the view Ask.
    """
    races = RaceQueue()
    with gr.Row(elem_id="race-controls", equal_height=True):
        per_skill = gr.Radio(
            [(str(count), count) for count in PER_SKILL],
            value=PER_SKILL[1],
            label="Pictures for each skill",
            elem_id="race-pictures",
        )
        start = gr.Button("Start", variant="primary", elem_id="race-start", size="md")
        stop = gr.Button("Stop", elem_id="race-stop", size="md")
    panel = gr.HTML(cards.start_panel(), elem_id="race", js_on_load=SAVE_PICTURE)
    gr.HTML(_code(sessions), elem_id="race-code")

    def run(count: Any, path: str | None, request: gr.Request) -> Iterator[str]:
        try:
            session = sessions.get(request.session_hash)
            own = [] if path is None else [Path(path)]
            files = [*own, *session.shared.examples]
            for stage in follow_race(races, session, files, count):
                if isinstance(stage, Standing) and stage.finished:
                    day = datetime.now(UTC).date()
                    yield cards.result_panel(stage, race_picture(stage, day))
                else:
                    yield cards.race_panel(stage)
        except RaceStoppedError as error:
            yield cards.stopped_panel(str(error))
        except Exception as error:
            yield cards.failed_panel(failure_message(error))

    def stop_race(request: gr.Request) -> None:
        races.stop(sessions.get(request.session_hash))

    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    start.click(
        run,
        [per_skill, picture],
        panel,
        concurrency_limit=None,  # our own queue orders them, and can stop one that waits
        **private,
    )
    stop.click(stop_race, js=FOCUS_START, **private)
    return View()


def _code(sessions: SessionRegistry) -> str:
    shared = sessions.shared
    first = next(iter(shared.tasks), "skill")
    rank = lora_rank(shared.fleet.kind.settings)
    return show_code(Shell=shell_snippet(first), Python=python_snippet(shared.threads, rank))
