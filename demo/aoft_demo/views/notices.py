"""Short notices as HTML; all texts are escaped."""

from __future__ import annotations

from html import escape

__all__ = ["busy", "empty", "failure", "note", "success", "verdict"]


def empty(title: str, text: str) -> str:
    """Placeholder for a result: what is missing, and what to do."""
    return f'<div class="empty"><b>{escape(title)}</b><p>{escape(text)}</p></div>'


def busy(text: str) -> str:
    """Placeholder while a result is computed."""
    return f'<div class="empty busy" role="status"><b>{escape(text)}</b></div>'


def failure(title: str, text: str) -> str:
    """Message about a failure, in place of the result."""
    return f'<div class="empty bad" role="alert"><b>{escape(title)}</b><p>{escape(text)}</p></div>'


def note(text: str) -> str:
    """Explanation in small print."""
    return f'<p class="note">{escape(text)}</p>'


def success(name: str, text: str) -> str:
    """Message about a task: an action succeeded."""
    return verdict(name, text, good=True)


def verdict(name: str, text: str, *, good: bool) -> str:
    """Message about a task, in the colour of a good or a bad result."""
    colour = "good" if good else "bad"
    return f'<div class="verdict {colour}" role="status"><b>{escape(name)}</b> {escape(text)}</div>'
