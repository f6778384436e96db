"""The view Take home: a task as a verified file in a format of choice, or all tasks in one file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import gradio as gr

from aoft_demo.actions.export import TakenHome, export_all, export_task
from aoft_demo.actions.formats import formats_of, usual_formats
from aoft_demo.tasks.session import Session
from aoft_demo.tasks.session_registry import SessionRegistry
from aoft_demo.views import notices
from aoft_demo.views.failures import show_failures
from aoft_demo.views.take_home import cards
from aoft_demo.views.task_lists import chosen_task, refreshed_dropdown, task_dropdown
from aoft_demo.views.units import size
from aoft_demo.views.view import View
from aoft_deploy.errors import AoftError

__all__ = ["take_home_view"]

START = notices.empty(
    "Nothing made yet",
    "The skill is merged into the model. The file is then run and compared with the skill as it "
    "was trained; only a file that gives the same answers can be downloaded.",
)

CHOSEN = "document.querySelector('#formats input:checked')?.value ?? ''"
"""JavaScript: the key of the chosen format."""

SHOW_RESULT = """() => {
    document.getElementById('exported').scrollIntoView({ block: 'nearest' });
    return [];
}"""
"""JavaScript: scroll to the result, which is below the formats on a phone."""

LIST_SCRIPT = """
const seen = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    seen.disconnect();
    trigger('seen');
});
seen.observe(element);
let open = false;
element.addEventListener('toggle', (event) => { open = event.target.open; }, true);
watch('value', () => {
    const more = element.querySelector('details');
    if (open && more) more.open = true;
});
"""
"""JavaScript: fire an event when the list is seen first, as its answer opens the checkpoint; and
keep the further formats open when the list changes."""

STEP = 5.0
"""Seconds between two messages; a screen reader reads each of them."""

Outputs = tuple[Any, Any, Any, Any]
"""Values of the panel, of both downloads, and of the next steps."""


def take_home_view(sessions: SessionRegistry) -> View:
    """Lay out the view and connect its events."""
    usual = usual_formats(sessions.shared)
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=300):
            task = task_dropdown(list(sessions.shared.tasks), label="Skill", elem_id="export-task")
            formats = gr.HTML(cards.format_list(usual), elem_id="formats", js_on_load=LIST_SCRIPT)
            export = gr.Button("Make and check the file", variant="primary", elem_id="export")
            together = gr.Button("Or all skills in one file", elem_id="export-all")
        with gr.Column(scale=6, min_width=300):
            panel = gr.HTML(START, elem_id="exported")
            with gr.Row(elem_id="files"):
                file = gr.DownloadButton(
                    visible=False, variant="primary", elem_id="artefact", min_width=140, scale=3
                )
                manifest = gr.DownloadButton(
                    "Its manifest", visible=False, elem_id="manifest", min_width=140, scale=2
                )
            following = gr.HTML(elem_id="next-steps")
    results = [panel, file, manifest, following]

    def list_formats(chosen: str | None, key: Any, request: gr.Request) -> str:
        found, chosen_key = usual, key if isinstance(key, str) else ""
        if chosen:
            try:
                found = formats_of(sessions.get(request.session_hash), chosen)
            except AoftError:  # the button says why
                found = usual
        return cards.format_list(found, chosen_key)

    @show_failures("Not made", output=0, outputs=4)
    def make(chosen: str | None, key: Any, request: gr.Request) -> Iterator[Outputs]:
        session = sessions.get(request.session_hash)
        chosen = chosen_task(session, chosen)
        yield from _in_steps(chosen, lambda: export_task(session, chosen, key))

    @show_failures("Not made", output=0, outputs=4)
    def make_all(request: gr.Request) -> Iterator[Outputs]:
        session = sessions.get(request.session_hash)
        yield from _in_steps(f"{len(session.tasks)} skills", lambda: export_all(session))

    private: dict[str, Any] = {"api_visibility": "private"}
    for changed in (formats.seen, task.change):
        changed(
            list_formats,
            [task, formats],
            formats,
            js=f"(task) => [task, {CHOSEN}]",
            show_progress="hidden",
            trigger_mode="always_last",
            concurrency_limit=2,
            **private,
        )
    one_at_a_time: dict[str, Any] = {
        "concurrency_limit": 1,
        "concurrency_id": "export",
        "show_progress": "hidden",
        **private,
    }
    export.click(
        make,
        [task, formats],
        results,
        js=f"(task) => {{ ({SHOW_RESULT})(); return [task, {CHOSEN}]; }}",
        **one_at_a_time,
    )
    together.click(make_all, None, results, js=SHOW_RESULT, **one_at_a_time)

    def refresh(session: Session, chosen: str | None) -> list[Any]:
        return [refreshed_dropdown(chosen, list(session.tasks))]

    return View([task], [task], refresh, task=task)


def _in_steps(what: str, work: Callable[[], TakenHome]) -> Iterator[Outputs]:
    """Do the work in a thread, and show every few seconds how long it has taken.

    Files of an earlier result stay until there is a new one.
    """
    text = f"Merging {what}, writing the file, running it and comparing the answers …"
    start, unchanged = time.monotonic(), (gr.skip(), gr.skip(), gr.skip())
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(work)
        yield notices.busy(text), *unchanged
        while not wait([result], STEP).done:
            yield notices.busy(f"{text} {time.monotonic() - start:.0f} s"), *unchanged
    done = result.result()
    label = f"Download {done.path.name} ({size(done.size)})"
    manifest = gr.DownloadButton(visible=False)
    if done.manifest is not None:
        manifest = gr.DownloadButton(value=str(done.manifest), visible=True)
    file = gr.DownloadButton(label, value=str(done.path), visible=True)
    yield cards.result_card(done), file, manifest, cards.next_card(done)
