"""Progress on stderr: a line that is redrawn, or without a terminal one line every 10 s."""

from __future__ import annotations

import sys
import time
from typing import Self

__all__ = ["Progress"]

SECONDS = 10.0
"""Time between two lines where stderr is no terminal."""

REDRAWN = 0.1
"""Time between two drawings on a terminal."""


class Progress:
    """Context manager: shows the state of some work on stderr, and removes it at the end.

    Args:
        hidden: Show nothing but notes.
    """

    def __init__(self, hidden: bool = False) -> None:
        self._on_terminal, self._hidden = sys.stderr.isatty(), hidden
        self._shown, self._is_drawn = time.monotonic(), False

    def show(self, text: str) -> None:
        """Show a state; one that follows too soon after another is dropped."""
        now = time.monotonic()
        if self._hidden or now - self._shown < (REDRAWN if self._on_terminal else SECONDS):
            return
        self._shown = now
        self.clear()
        print(text, end="" if self._on_terminal else "\n", file=sys.stderr, flush=True)
        self._is_drawn = self._on_terminal

    def note(self, line: str) -> None:
        """Print a line that stays."""
        self.clear()
        print(line, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Remove the state from the terminal, before something else is printed."""
        if self._is_drawn:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._is_drawn = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.clear()
