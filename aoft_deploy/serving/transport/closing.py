"""Closing a connection without losing the last answer.

If a socket is closed while bytes from the client are unread, or if more bytes arrive afterwards,
the system resets the connection, and the client loses the part of the answer that it has not read
yet. Here the sending side is closed first. Bytes that the client still sends are discarded until it
closes its side, within limits on time and size.
"""

from __future__ import annotations

import asyncio
from typing import Any

__all__ = ["Closing"]

LINGER_SECONDS = 1.0
LINGER_BYTES = 2**20
"""Limits on what a client sends after the end of the answers."""


class Closing:
    """A transport that closes its sending side first.

    Args:
        transport: asyncio's transport.
        loop: The event loop.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._closing = False
        self._discarded = 0
        self._timer: asyncio.TimerHandle | None = None
        self.write: Any = transport.write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Whether the sending side is closed."""
        return self._closing or self._transport.is_closing()

    def close(self) -> None:
        """Send everything that was written, then close the sending side.

        The connection ends when the client closes it, or when a limit is reached.
        """
        if self.is_closing():
            return
        self._closing, self.write = True, _ignore
        self._timer = self._loop.call_later(LINGER_SECONDS, self.end)
        try:
            self._transport.write_eof()
            self._transport.resume_reading()
        except OSError:  # the client has reset the connection
            self._transport.abort()

    def discard(self, size: int) -> None:
        """Count bytes that arrived after the sending side was closed."""
        self._discarded += size
        if self._discarded > LINGER_BYTES:
            self.end()

    def end(self) -> None:
        """Close the connection without waiting for the client."""
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        self._transport.close()


def _ignore(data: bytes) -> None:
    pass
