"""HTTP/1.1 connections: uvicorn's, with limits and failures of their own.

uvicorn waits for a request's first bytes for ever, on httptools takes headers of any size and
number, and tells failures of HTTP itself in plain text.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import orjson

__all__ = ["connections"]

HEADER_SECONDS = 10.0
"""Time for the headers of a connection's first request."""

MAX_HEAD = 65536
"""Bytes of a request before its body; what arrives in one piece may be more."""

MAX_HEADERS = 256

if TYPE_CHECKING:

    class _Connection(asyncio.Protocol):
        """What is used of uvicorn's two classes."""

        loop: asyncio.AbstractEventLoop
        transport: asyncio.Transport
        connections: set[Any]
        cycle: Any
        parser: Any
        headers: list[tuple[bytes, bytes]]

        def on_header(self, name: bytes, value: bytes) -> None: ...
        def on_headers_complete(self) -> None: ...
        def on_message_complete(self) -> None: ...
else:
    _Connection = object


class _Limits(_Connection):
    """A connection that ends if no request comes, or if there are too many others."""

    most = 1024

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, unless there are too many."""
        super().connection_made(transport)
        self._patience: asyncio.TimerHandle | None = None
        if len(self.connections) > self.most:
            transport.write(_plain(503, "Too many connections.", "Retry-After: 1\r\n"))
            transport.close()
        else:
            self._patience = self.loop.call_later(HEADER_SECONDS, self._nothing_came)

    def data_received(self, data: bytes) -> None:
        """Take bytes in; what is no HTTP ends the connection."""
        if not self.transport.is_closing():
            super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        if self._patience is not None:
            self._patience.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Tell what is wrong in the protocol's own form, unless an answer is on its way."""
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            self.transport.write(_plain(400, msg))
        self.transport.close()

    def _nothing_came(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


class _LimitedHead(_Limits):
    """For httptools: limits that h11 has by itself."""

    _head, _in_head = 0, True

    def data_received(self, data: bytes) -> None:
        """Take bytes in, not more than a head may have."""
        if self._in_head:
            self._head += len(data)
        super().data_received(data)
        if self._in_head and self._head > MAX_HEAD and not self.transport.is_closing():
            self.transport.write(_plain(431, "The headers are too large."))
            self.transport.close()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; what is raised here ends the connection with 400."""
        if len(self.headers) >= MAX_HEADERS or (
            name.lower() == b"content-length"
            and any(other == b"content-length" for other, _ in self.headers)
        ):
            raise ValueError("too many headers")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A body follows."""
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The next request's head follows."""
        self._head, self._in_head = 0, True
        super().on_message_complete()


def connections(http: str, most: int) -> type[asyncio.Protocol]:
    """The class of a server's connections.

    Args:
        http: ``h11`` or ``httptools``.
        most: How many connections there may be.

    Raises:
        ImportError: The parser is not installed.
    """
    base: type[Any]
    if http == "h11":
        from uvicorn.protocols.http.h11_impl import H11Protocol

        base, limits = H11Protocol, _Limits
    else:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

        base, limits = HttpToolsProtocol, _LimitedHead
    return type("Connection", (limits, base), {"most": most})


def _plain(status: int, message: str, headers: str = "") -> bytes:
    """A whole response of a connection that ends."""
    content = orjson.dumps({"error": message})
    head = (
        f"HTTP/1.1 {status} \r\nContent-Type: application/json\r\nConnection: close\r\n{headers}"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content
