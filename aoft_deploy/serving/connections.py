"""HTTP/1.1 connections: uvicorn's on h11, with limits and failures of their own.

uvicorn waits for a request's first bytes forever, and tells failures of HTTP itself in plain text.
"""

from __future__ import annotations

import asyncio

import h11
import orjson
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["LimitedConnection", "limited"]

HEADER_SECONDS = 10.0
"""Time for the headers of a connection's first request."""


class LimitedConnection(H11Protocol):
    """A connection that ends if no request comes, or if there are too many others."""

    most = 1024

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, unless there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.write(_plain(503, "Too many connections.", "Retry-After: 1\r\n"))
            transport.close()
            return
        self._patience = self.loop.call_later(HEADER_SECONDS, self._nothing_came)

    def data_received(self, data: bytes) -> None:
        """Take bytes in; what is no HTTP ends the connection."""
        if not self.transport.is_closing():
            super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        patience: asyncio.TimerHandle | None = getattr(self, "_patience", None)
        if patience is not None:
            patience.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Tell what is wrong in the protocol's own form."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(_plain(400, msg))
        self.transport.close()

    def _nothing_came(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


def limited(most: int) -> type[LimitedConnection]:
    """The class for a server with that many connections."""
    return type("LimitedConnection", (LimitedConnection,), {"most": most})


def _plain(status: int, message: str, headers: str = "") -> bytes:
    """A whole response of a connection that ends."""
    content = orjson.dumps({"error": message})
    head = (
        f"HTTP/1.1 {status} \r\nContent-Type: application/json\r\nConnection: close\r\n{headers}"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content
