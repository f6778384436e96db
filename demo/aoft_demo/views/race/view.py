"""The view Race: one mixed batch against one session per task."""

from __future__ import annotations

import gradio as gr

from aoft_demo.tasks.session_registry import SessionRegistry
from aoft_demo.views.view import View

__all__ = ["race_view"]


def race_view(sessions: SessionRegistry, picture: gr.Image) -> View:
    """Lay out the view and connect its events.

    Args:
        sessions: All sessions.
        picture: The picture of the view Ask.
    """
    return View()
