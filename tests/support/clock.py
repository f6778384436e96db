"""An event loop whose time passes when a test says so."""

from __future__ import annotations

import asyncio


class Clock:
    """Time of the running event loop: real, and ahead of it by what a test let pass."""

    def __init__(self) -> None:
        loop, self.ahead = asyncio.get_running_loop(), 0.0
        real = loop.time
        loop.time = lambda: real() + self.ahead  # type: ignore[method-assign]

    async def go(self, seconds: float) -> None:
        """Let time pass, and all that is due by then happen."""
        self.ahead += seconds
        await settled()


async def settled() -> None:
    """Let bytes on this machine's own connections arrive, and what they start begin."""
    for _ in range(20):  # each time sockets are looked at
        await asyncio.sleep(0)
