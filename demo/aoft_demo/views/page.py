"""The page: its views, and the updates after a session's tasks have changed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import gradio as gr

from aoft_demo.actions.residents import residents
from aoft_demo.tasks.session import Session
from aoft_demo.tasks.session_registry import SessionRegistry
from aoft_demo.tasks.shared_fleet import SharedFleet
from aoft_demo.views.ask import cards
from aoft_demo.views.ask.view import ask_view
from aoft_demo.views.explain.view import explain_view
from aoft_demo.views.failures import failure_message
from aoft_demo.views.race.view import race_view
from aoft_demo.views.skills.view import skills_view
from aoft_demo.views.take_home.view import take_home_view
from aoft_demo.views.teach.view import teach_view
from aoft_demo.views.view import View

__all__ = ["SCRIPT", "Page", "build"]

TABS = {
    "ask": "Ask",
    "skills": "Skills",
    "race": "Race",
    "teach": "Teach",
    "take-home": "Take home",
    "how": "How it works",
}
"""Names of the tabs by their part of a link."""

SCRIPT = Path(__file__).with_name("page.js").read_text("utf-8")
SCRIPT = SCRIPT.replace("__TABS__", json.dumps(TABS))
"""JavaScript of the whole page."""

HIDDEN: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


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
        header: Any = gr.HTML(
            elem_id="head",
            js_on_load="aoft.ready(() => trigger('linked'))",
            apply_default_css=False,
        )
        views: dict[str, View] = {}
        tabs: dict[str, gr.Tab] = {}
        with gr.Tabs(elem_id="tabs"):
            for tab, name in TABS.items():
                with gr.Tab(name, id=tab, elem_id=f"tab-{tab}") as tabs[tab]:
                    if tab == "ask":
                        ask = ask_view(sessions)
                        views[tab] = ask.view
                    elif tab == "skills":
                        views[tab] = skills_view(sessions, ask.picture)
                    elif tab == "race":
                        views[tab] = race_view(sessions, ask.picture)
                    elif tab == "teach":
                        views[tab] = teach_view(sessions)
                    elif tab == "take-home":
                        views[tab] = take_home_view(sessions)
                    else:
                        views[tab] = explain_view(sessions, ask.picture)
        _connect(page, sessions, header, list(views.values()))
        _link(header, {tab: view.task for tab, view in views.items() if view.task is not None})
        for tab in list(tabs)[1:]:
            _load_when_selected(tabs[tab])
    _fill(sessions, header, list(views.values()))
    return page


def _connect(page: gr.Blocks, sessions: SessionRegistry, header: Any, views: list[View]) -> None:
    """Refresh all views after a view has changed the tasks, and when a page is loaded."""
    inputs = [component for view in views for component in view.inputs]
    outputs = [header, *(component for view in views for component in view.outputs)]

    def refresh(request: gr.Request, *given: Any) -> list[Any]:
        return _values(sessions.get(request.session_hash), sessions.shared, views, given)

    def attach(request: gr.Request, key: str | None, *given: Any) -> list[Any]:
        session = sessions.attach(request.session_hash, key)
        if session.is_new:  # the page shows this already
            return [part.value if _has_data(part) else gr.skip() for part in outputs]
        return _values(session, sessions.shared, views, given)

    def leave(request: gr.Request) -> None:
        sessions.leave(request.session_hash)

    with_key = "(head, ...rest) => [aoft.key(), ...rest]"
    attached = page.load(attach, [header, *inputs], outputs, js=with_key, **HIDDEN)
    attached.then(None, js="() => { aoft.attached = true; }", **HIDDEN)
    for event in (event for view in views for event in view.changes):
        # A change that comes while an earlier one is shown is shown afterwards, not dropped.
        event.success(refresh, inputs, outputs, trigger_mode="always_last", **HIDDEN)
    page.unload(leave)


def _fill(sessions: SessionRegistry, header: Any, views: list[View]) -> None:
    """Show a new session in the page as it is sent, so that it is never empty."""
    given = [component.value for view in views for component in view.inputs]
    outputs = [header, *(component for view in views for component in view.outputs)]
    first = _values(sessions.get("first"), sessions.shared, views, given)
    for component, value in zip(outputs, first, strict=True):
        if isinstance(component, gr.HTML):
            component.value = value
    sessions.leave("first")


def _values(
    session: Session, shared: SharedFleet, views: list[View], given: Sequence[Any]
) -> list[Any]:
    """Values of the header and of all views' outputs."""
    rest = iter(given)
    return [
        cards.header(shared, residents(session)),
        *(
            value
            for view in views
            for value in view.refresh(session, *islice(rest, len(view.inputs)))
        ),
    ]


def _has_data(component: Any) -> bool:
    """Whether an HTML component has a value of data, which a handler of ours checks.

    Gradio makes such a component anew when an event skips or updates it, without our check.
    """
    return isinstance(component, gr.HTML) and isinstance(component.value, dict)


def _link(header: Any, tasks: dict[str, Any]) -> None:
    """Let links choose the views' tasks, and let choices change the link."""
    components = list(tasks.values())
    if components:
        choose = f"(...values) => aoft.chosen({json.dumps(list(tasks))}, values)"
        header.linked(None, components, components, js=choose, **HIDDEN)
    for tab, component in tasks.items():
        component.change(
            None, component, None, js=f"(name) => aoft.name({json.dumps(tab)}, name)", **HIDDEN
        )


def _load_when_selected(tab: gr.Tab) -> None:
    """Let the browser load the tab's kinds of components only when the tab is selected."""
    later = [part for part in _parts(tab) if part.visible is True]
    for part in later:
        part.visible = False
    if later:
        show = "{__type__: 'update', visible: true}"
        values = f"Array.from({{length: {len(later)}}}, () => ({show}))"
        tab.select(None, None, later, js=f"() => {values}{'[0]' * (len(later) == 1)}", **HIDDEN)


def _parts(block: Any) -> Iterator[Any]:
    """The components within a block, without those that only lay out others."""
    for child in block.children:
        if getattr(child, "children", None) and not isinstance(child, gr.HTML):
            yield from _parts(child)
        else:
            yield child
