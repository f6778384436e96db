"""Texts for messages: errors in one line, shortened values, decoded metadata."""

from __future__ import annotations

import json
import re
from typing import Any

__all__ = ["decoded", "natural_order", "one_line", "shortened"]


def one_line(error: object, most: int = 200) -> str:
    """An error's text in one line of at most ``most`` characters; its class if it has no text."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def shortened(value: object, most: int = 60) -> str:
    """A value's ``repr``, cut to ``most`` characters with an ellipsis."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def natural_order(text: str) -> list[tuple[int, int, str]]:
    """Sort key that compares digits as numbers: ``img2`` comes before ``img10``."""
    parts = re.split(r"(\d+)", text)  # every second part is a number
    return [(int(part), len(part), "") if i % 2 else (0, 0, part) for i, part in enumerate(parts)]


def decoded(text: str) -> Any:
    """Decode a JSON text; return any other text unchanged."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
