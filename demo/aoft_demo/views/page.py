"""The page: its views, and the updates after a session's tasks have changed."""

from __future__ import annotations

from itertools import islice
from typing import Any

import gradio as gr

from aoft_demo.actions.residents import residents
from aoft_demo.tasks.session_registry import SessionRegistry
from aoft_demo.views.ask import cards
from aoft_demo.views.ask.view import ask_view
from aoft_demo.views.explain.view import explain_view
from aoft_demo.views.failures import failure_message
from aoft_demo.views.race.view import race_view
from aoft_demo.views.skills.view import skills_view
from aoft_demo.views.take_home.view import take_home_view
from aoft_demo.views.teach.view import teach_view
from aoft_demo.views.view import View

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
            with gr.Tab("Ask", id="ask"):
                ask = ask_view(sessions)
            with gr.Tab("Skills", id="skills"):
                skills = skills_view(sessions)
            with gr.Tab("Race", id="race"):
                race = race_view(sessions, ask.picture)
            with gr.Tab("Teach", id="teach"):
                teach = teach_view(sessions)
            with gr.Tab("Take home", id="take-home"):
                take_home = take_home_view(sessions)
            with gr.Tab("How it works", id="how"):
                explain = explain_view(sessions, ask.picture)
        _connect(page, sessions, header, [ask.view, skills, race, teach, take_home, explain])
    return page


def _connect(
    page: gr.Blocks, sessions: SessionRegistry, header: gr.HTML, views: list[View]
) -> None:
    """Refresh all views when the page is loaded, and after a view has changed the tasks."""

    def refresh(request: gr.Request, *values: Any) -> list[Any]:
        session = sessions.get(request.session_hash)
        given = iter(values)
        return [
            cards.header(sessions.shared, residents(session)),
            *(
                value
                for view in views
                for value in view.refresh(session, *islice(given, len(view.inputs)))
            ),
        ]

    def end_session(request: gr.Request) -> None:
        sessions.end(request.session_hash)

    inputs = [component for view in views for component in view.inputs]
    outputs = [header, *(component for view in views for component in view.outputs)]
    hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    page.load(refresh, inputs, outputs, **hidden)
    for event in (event for view in views for event in view.changes):
        event.success(refresh, inputs, outputs, **hidden)
    page.unload(end_session)
