"""Texts for messages: errors of libraries in one line, long values shortened, metadata decoded."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["decoded", "one_line", "shortened"]


def one_line(error: object, most: int = 200) -> str:
    """An error's text in one line of at most ``most`` characters; its class if it has no text."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def shortened(value: object, most: int = 60) -> str:
    """A value's ``repr``, cut with an ellipsis to ``most`` characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def decoded(text: str) -> Any:
    """The value of a JSON text; any other text as it is."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
