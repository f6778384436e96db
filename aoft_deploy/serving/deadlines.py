"""Many deadlines that are seldom met, at the price of a dictionary's entry each.

asyncio's timers cost more than reading a small request. Here one timer looks at all of them.
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
        self._ticking = False

    def add(self, key: Hashable, seconds: float, call: Callable[[], object]) -> None:
        """Make a call after some seconds, in place of an earlier one under that key."""
        loop = asyncio.get_running_loop()
        self._calls[key] = loop.time() + seconds, call
        if not self._ticking:
            self._ticking = True
            loop.call_later(min(seconds, TICK), self._tick, loop)

    def discard(self, key: Hashable) -> None:
        """Leave a call out that may have been made."""
        self._calls.pop(key, None)

    def shorten(self, seconds: float) -> None:
        """Make every call after some seconds at the latest."""
        end = asyncio.get_running_loop().time() + seconds
        self._calls = {key: (min(when, end), call) for key, (when, call) in self._calls.items()}

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        due = [(key, call) for key, (when, call) in self._calls.items() if when <= now]
        for key, call in due:
            del self._calls[key]
            call()
        self._ticking = bool(self._calls)
        if self._ticking:
            loop.call_later(TICK, self._tick, loop)
