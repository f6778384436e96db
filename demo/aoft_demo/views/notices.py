"""Short notices of the page: empty, wait, problem, note and done."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

__all__ = ["done", "empty", "note", "problem", "wait"]


def empty(title: str, text: str) -> str:
    """Nothing to show yet, and what to do about it."""
    return f'<div class="empty"><b>{escape(title)}</b><p>{escape(text)}</p></div>'


def wait(text: str) -> str:
    """Something is under way."""
    return f'<div class="empty busy" role="status"><b>{escape(text)}</b></div>'


def problem(title: str, text: str) -> str:
    """What went wrong, where the result would be."""
    return f'<div class="empty bad" role="alert"><b>{escape(title)}</b><p>{escape(text)}</p></div>'


def note(text: str) -> str:
    """A quiet sentence."""
    return f'<p class="note">{escape(text)}</p>'


def done(name: str, text: str) -> str:
    """Something about a task has succeeded."""
    return f'<div class="said good" role="status"><b>{escape(name)}</b> {escape(text)}</div>'
