"""Lists of a visitor's tasks to choose from, which keep what was chosen as tasks come and go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

__all__ = ["chooser", "names_among", "refreshed"]


def chooser(names: Sequence[str], **more: Any) -> gr.Dropdown:
    """A list of tasks, the first of which is chosen; handlers get the name or None.

    A name that has left meanwhile comes through, so that the handler can say so.
    """
    made: gr.Dropdown = gr.Dropdown(list(names), value=names[0] if names else None, **more)
    made.preprocess = _name  # type: ignore[method-assign]
    return made


def _name(payload: Any) -> str | None:
    return payload if isinstance(payload, str) else None


def names_among(payload: Any) -> list[str]:
    """The ticked names, of which some may have left meanwhile."""
    return [name for name in payload if isinstance(name, str)] if isinstance(payload, list) else []


def refreshed(chosen: str | None, names: Sequence[str]) -> gr.Dropdown:
    """A list after the tasks have changed.

    It points at what it pointed at before, or at nothing where that has left: nobody should remove
    or export by a further click what they did not choose. Only in that case its value is sent: a
    visitor may have chosen another task meanwhile.
    """
    if chosen and chosen not in names:
        return gr.Dropdown(list(names), value=None)
    return gr.Dropdown(list(names))
