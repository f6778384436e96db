"""Lists of a session's tasks to choose from; they keep the choice when tasks are added or removed.

Gradio rejects a choice that is not in the list. A task may be removed while the page shows it, so
these lists accept every name, and the handler reports an unknown task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import gradio as gr

__all__ = ["refreshed_dropdown", "task_dropdown"]


def task_dropdown(names: Sequence[str], **properties: Any) -> gr.Dropdown:
    """A dropdown of tasks; the first one is chosen.

    Handlers get a name, also of a task that was removed, or None.

    Args:
        names: Names of the tasks.
        properties: Further arguments of ``gradio.Dropdown``.
    """
    import gradio as gr

    dropdown: gr.Dropdown = gr.Dropdown(
        list(names), value=names[0] if names else None, **properties
    )
    dropdown.preprocess = _valid_name  # type: ignore[method-assign]
    return dropdown


def refreshed_dropdown(chosen: str | None, names: Sequence[str]) -> gr.Dropdown:
    """Update of a dropdown after the tasks have changed.

    The choice stays. If its task was removed, nothing is chosen, so that a further click cannot
    remove or export another task. The value is sent only in that case: the user may have chosen
    another task in the meantime.
    """
    import gradio as gr

    if chosen and chosen not in names:
        return gr.Dropdown(list(names), value=None)
    return gr.Dropdown(list(names))


def _valid_name(payload: Any) -> str | None:
    return payload if isinstance(payload, str) else None
