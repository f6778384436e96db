"""An event loop whose clock a test can advance."""

from __future__ import annotations

import asyncio


class Clock:
    """Clock of the running event loop: the real time plus an offset that tests advance."""

    def __init__(self) -> None:
        loop, self.ahead = asyncio.get_running_loop(), 0.0
        real = loop.time
        loop.time = lambda: real() + self.ahead  # type: ignore[method-assign]

    async def go(self, seconds: float) -> None:
        """Advance the clock and run everything that is due."""
        self.ahead += seconds
        await settled()


async def settled() -> None:
    """Let the event loop deliver what was sent on local connections and start its handlers."""
    for _ in range(20):  # each iteration polls the sockets
        await asyncio.sleep(0)
