"""Closing a connection so that the last answer arrives.

A socket that is closed while bytes of the client lie unread, or come afterwards, is reset. A reset
takes back what the client has not read yet, so the answer is lost. Here the end of the answers is
told first; what the client still sends is passed over until it closes too, for a while.
"""

from __future__ import annotations

import asyncio
from typing import Any

__all__ = ["Closing"]

LINGER_SECONDS = 1.0
LINGER_BYTES = 2**20
"""Time and bytes that a client may go on sending after the end of the answers."""


class Closing:
    """A transport that says goodbye before it closes.

    Args:
        transport: Asyncio's own.
        loop: The event loop.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._leaving = False
        self._passed = 0
        self._timer: asyncio.TimerHandle | None = None
        self.write: Any = transport.write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Whether nothing more is answered."""
        return self._leaving or self._transport.is_closing()

    def close(self) -> None:
        """Send what was written and the end of it; close when the client does, or after a while."""
        if self.is_closing():
            return
        self._leaving, self.write = True, _nowhere
        self._timer = self._loop.call_later(LINGER_SECONDS, self.end)
        try:
            self._transport.write_eof()
            self._transport.resume_reading()
        except OSError:  # the client has reset the connection
            self._transport.abort()

    def passed(self, size: int) -> None:
        """So many bytes came after the end, and nobody looks at them."""
        self._passed += size
        if self._passed > LINGER_BYTES:
            self.end()

    def end(self) -> None:
        """Close without waiting for the client."""
        self._leaving = True
        if self._timer is not None:
            self._timer.cancel()
        self._transport.close()


def _nowhere(data: bytes) -> None:
    pass
