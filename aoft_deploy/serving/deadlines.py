"""Many deadlines behind a single timer.

An asyncio timer costs more than reading a small request, while a deadline here costs a dictionary
entry. The timer fires only when the earliest known deadline is due: if the event loop woke more
often while an engine computes on all cores, it would displace one of the engine's threads, and all
the others would wait for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable

__all__ = ["Deadlines"]

TICK = 0.01
"""Seconds by which a deadline may be late."""


class Deadlines:
    """Callbacks that run at their deadlines unless they are discarded. Used in one event loop."""

    def __init__(self) -> None:
        self._calls: dict[Hashable, tuple[float, Callable[[], object]]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, key: Hashable, seconds: float, call: Callable[[], object]) -> None:
        """Schedule a callback; it replaces an earlier one with the same key."""
        loop = asyncio.get_running_loop()
        when = loop.time() + seconds
        self._calls[key] = when, call
        self._set_timer(when, loop)

    def discard(self, key: Hashable) -> None:
        """Cancel a callback; does nothing if it has run."""
        self._calls.pop(key, None)

    def shorten(self, seconds: float) -> None:
        """Let every callback run after this time at the latest."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        self._calls = {key: (min(when, end), call) for key, (when, call) in self._calls.items()}
        if self._calls:
            self._set_timer(end, loop)

    def _set_timer(self, when: float, loop: asyncio.AbstractEventLoop) -> None:
        """Let the timer fire at this time or earlier."""
        if self._timer is not None:
            if self._timer.when() <= when:
                return
            self._timer.cancel()
        self._timer = loop.call_at(when, self._run_due, loop)

    def _run_due(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer, now = None, loop.time()
        due = [(key, call) for key, (when, call) in self._calls.items() if when <= now]
        for key, call in due:
            if self._calls.pop(key, None) is not None:
                call()
        if self._calls:
            first = min(when for when, _ in self._calls.values())
            self._set_timer(max(first, loop.time() + TICK), loop)
