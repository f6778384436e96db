"""Connections with httptools: limits on the head, and bodies received without a copy.

h11 limits the head by itself; httptools accepts heads of any size with any number of headers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from aoft_deploy.serving.transport.calls import MAX_HEADERS
from aoft_deploy.serving.transport.inflow import INFLOW, Disconnected, Inflow
from aoft_deploy.serving.transport.limited_connection import LimitedConnection

__all__ = ["HttptoolsConnection"]

MAX_HEAD = 65536
"""Maximum bytes before, after or between two parts of a body; more is accepted in one packet."""

SCRATCH = memoryview(bytearray(65536))
"""Buffer of all connections for bytes without a buffer of their own; they are copied at once."""


class HttptoolsConnection(LimitedConnection):
    """A connection with a limited head that receives bodies directly into their buffer.

    The limit also covers trailers and chunk extensions, which httptools keeps or reads whole.

    Attributes:
        parsing: Creates the parser of a connection.
    """

    parsing: Callable[[object], Any]
    _head = 0  # bytes since the last part of a body
    _left = 0  # bytes of a body of known length that have not arrived
    _inflow: Inflow | None = None  # of a body that bypasses the parser

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the connection."""
        self.parser = self.parsing(self)
        super().connection_made(transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        """The buffer for the next bytes."""
        if self._inflow is None or self.transport.is_closing():
            return SCRATCH
        return self._inflow.remaining or SCRATCH[: self._left]

    def buffer_updated(self, nbytes: int) -> None:
        """Process the bytes that were written to the buffer."""
        if self._inflow is None or self.transport.is_closing():
            self.data_received(bytes(SCRATCH[:nbytes]))
            return
        self._unset_keepalive_if_required()
        self.seen = self.loop.time()
        if self._inflow.remaining:
            self._inflow.written(nbytes)
            self._left -= nbytes
        else:
            self.on_body(bytes(SCRATCH[:nbytes]))
        if not self._left:
            self.parser = self.parsing(self)  # the old parser is still waiting for the body
            self.on_message_complete()
        self._update_head_timer()

    def data_received(self, data: bytes) -> None:
        """Parse bytes, up to the limit on the head."""
        self._head += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._head > MAX_HEAD:
            self.refuse(431, "The headers are too large.")
        elif self._left and not self.pipeline:
            self._inflow = Inflow(partial(self._begin, self.cycle))
            self.scope[INFLOW] = self._inflow

    def connection_lost(self, exc: Exception | None) -> None:
        """Release the connection, and end the wait for a body."""
        super().connection_lost(exc)
        if self._inflow is not None:
            self._inflow.disconnected()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; an exception ends the connection with status 400."""
        if len(self.headers) >= MAX_HEADERS or (
            name.lower() == b"content-length"
            and any(other == b"content-length" for other, _ in self.headers)
        ):
            raise ValueError("too many headers")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Note the end of the head."""
        self._head = 0
        super().on_headers_complete()
        fields = dict(self.headers)
        length = fields.get(b"content-length", b"")
        known = b"transfer-encoding" not in fields
        self._left = int(length) if known and length.isdigit() and len(length) <= 18 else 0

    def on_chunk_header(self) -> None:
        """Note the start of a chunk of the body, or of its trailers."""
        self._head = 0

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self._head = 0
        self._left -= min(len(body), self._left)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Note the end of the request."""
        if self.parser.stopped:
            return  # the body follows, and is parsed by another parser
        self._head = self._left = 0
        self._inflow = None
        super().on_message_complete()

    def _begin(self, cycle: Any) -> bytearray:
        """Take the part of a request's body that has arrived, and resume reading."""
        if cycle.disconnected:
            raise Disconnected
        if cycle.waiting_for_100_continue:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            cycle.waiting_for_100_continue = False
        first: bytearray = cycle.body
        cycle.body = bytearray()
        self.flow.resume_reading()
        return first
