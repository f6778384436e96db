"""Many deadlines that are seldom met, at the price of a dictionary's entry each.

asyncio's timers cost more than reading a small request. Here one timer looks at all of them, and
only when the first of those it knew is due: a loop that wakes while an engine computes on all cores
holds up the thread it displaces, and with it all others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable

__all__ = ["Deadlines"]

TICK = 0.01
"""Seconds by which a deadline may be late."""


class Deadlines:
    """Calls to make when time is up, unless they are discarded before. Of one event loop."""

    def __init__(self) -> None:
        self._calls: dict[Hashable, tuple[float, Callable[[], object]]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, key: Hashable, seconds: float, call: Callable[[], object]) -> None:
        """Make a call after some seconds, in place of an earlier one under that key."""
        loop = asyncio.get_running_loop()
        when = loop.time() + seconds
        self._calls[key] = when, call
        self._look(when, loop)

    def discard(self, key: Hashable) -> None:
        """Leave a call out that may have been made."""
        self._calls.pop(key, None)

    def shorten(self, seconds: float) -> None:
        """Make every call after some seconds at the latest."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        self._calls = {key: (min(when, end), call) for key, (when, call) in self._calls.items()}
        if self._calls:
            self._look(end, loop)

    def _look(self, when: float, loop: asyncio.AbstractEventLoop) -> None:
        """Look at all calls at that time, or before."""
        if self._timer is not None:
            if self._timer.when() <= when:
                return
            self._timer.cancel()
        self._timer = loop.call_at(when, self._due, loop)

    def _due(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer, now = None, loop.time()
        due = [(key, call) for key, (when, call) in self._calls.items() if when <= now]
        for key, call in due:
            if self._calls.pop(key, None) is not None:
                call()
        if self._calls:
            first = min(when for when, _ in self._calls.values())
            self._look(max(first, loop.time() + TICK), loop)
