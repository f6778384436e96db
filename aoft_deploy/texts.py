"""Texts for messages: errors in one line, shortened values, decoded metadata."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["decoded", "one_line", "shortened"]


def one_line(error: object, most: int = 200) -> str:
    """An error's text in one line of at most ``most`` characters; its class if it has no text."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def shortened(value: object, most: int = 60) -> str:
    """A value's ``repr``, cut to ``most`` characters with an ellipsis."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def decoded(text: str) -> Any:
    """Decode a JSON text; return any other text unchanged."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
