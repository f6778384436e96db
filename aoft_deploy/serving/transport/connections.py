"""HTTP/1.1 connections: uvicorn's, with limits and failures of their own.

uvicorn waits for a request's first bytes for ever, on httptools takes headers of any size and
number, and tells failures of HTTP itself in plain text. Large bodies go past it, see
:mod:`~aoft_deploy.serving.transport.inflow`; how a connection ends stands in
:mod:`~aoft_deploy.serving.transport.closing`.

Above the limit of connections there are a few spare places, for ``/v2/health`` alone, so that a
full server is not taken for a dead one. The latest comers have them; who waits longest makes room.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, MutableMapping
from functools import partial
from typing import TYPE_CHECKING, Any

import orjson
from starlette.types import ASGIApp, Receive, Scope, Send

from aoft_deploy.serving.transport.calls import MAX_HEADERS
from aoft_deploy.serving.transport.closing import Closing
from aoft_deploy.serving.transport.descriptors import SPARE
from aoft_deploy.serving.transport.inflow import INFLOW, Disconnected, Inflow

__all__ = ["connections"]

HEADER_SECONDS = 10.0
"""Time for a request's headers, from its first byte; of a connection's first, from its start."""

SPARE_SECONDS = 1.0
"""The same in a spare place."""

MAX_HEAD = 65536
"""Bytes before a body, between two parts of it or after it; what arrives in one piece may be more.
"""

FULL = "Too many connections."

SCRATCH = memoryview(bytearray(65536))
"""What any connection's socket gave and no place waits for; whoever reads it copies it at once."""

if TYPE_CHECKING:

    class _Connection(asyncio.Protocol):
        """What is used of uvicorn's two classes."""

        app: Any
        loop: asyncio.AbstractEventLoop
        transport: Closing
        connections: set[Any]
        cycle: Any
        flow: Any
        parser: Any
        pipeline: Any
        scope: dict[str, Any]
        headers: list[tuple[bytes, bytes]]

        def _unset_keepalive_if_required(self) -> None: ...
        def on_response_complete(self) -> None: ...
        def on_header(self, name: bytes, value: bytes) -> None: ...
        def on_headers_complete(self) -> None: ...
        def on_body(self, body: bytes) -> None: ...
        def on_message_complete(self) -> None: ...
else:
    _Connection = object


class _Limits(_Connection):
    """A connection that ends if no request comes, or if there are too many others.

    Attributes:
        seen: When something last came or went, by the event loop's clock.
    """

    most = 1024
    spare: dict[_Limits, None]
    seen = 0.0
    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin; above the limit in a spare place."""
        super().connection_made(Closing(transport, self.loop))  # type: ignore[arg-type]
        self.seen = self.loop.time()
        if len(self.connections) > self.most:
            self._take_spare_place()
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Take bytes in; what is no HTTP ends the connection."""
        if self.transport.is_closing():
            self.transport.passed(len(data))
            return
        self.seen = self.loop.time()
        super().data_received(data)
        self._look_for_head()

    def on_response_complete(self) -> None:
        """An answer is out."""
        self.seen = self.loop.time()
        super().on_response_complete()

    def part(self, before: float) -> None:
        """End, if nothing is being answered and nothing came or went since then."""
        if self.idle and self.seen <= before:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._forget_head()
        self._unset_keepalive_if_required()  # uvicorn does not where the client reset it
        self.spare.pop(self, None)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Tell what is wrong in the protocol's own form."""
        self._end(400, msg)

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or bool(self.cycle.response_complete)

    def _end(self, status: int, message: str) -> None:
        """Say why the connection ends, unless an answer is on its way."""
        if self.idle or not self.cycle.response_started:
            after = "Retry-After: 1\r\n" if status == 503 else ""
            self.transport.write(_plain(status, message, after))
        self.transport.close()

    def _look_for_head(self) -> None:
        """Bytes came: of a request that is being answered, or of one to come."""
        if self.idle:
            self._await_head()
        else:
            self._forget_head()

    def _take_spare_place(self) -> None:
        self.app = partial(_health_alone, self.app)
        self.spare[self] = None
        if len(self.spare) > SPARE:
            longest = next(iter(self.spare))
            del self.spare[longest]
            longest._end(503, FULL)
            longest.transport.end()  # which waits for no client, since the next one comes

    def _await_head(self) -> None:
        if self._patience is None:
            seconds = SPARE_SECONDS if self in self.spare else HEADER_SECONDS
            self._patience = self.loop.call_later(seconds, self._nothing_came)

    def _forget_head(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _nothing_came(self) -> None:
        if self.idle and not self.transport.is_closing():
            if self in self.spare:
                self._end(503, FULL)
            self.transport.close()


class _LimitedHead(_Limits):
    """For httptools: limits that h11 has by itself, and bodies that go straight to their place.

    Trailers and what stands beside a chunk's size count too: httptools keeps or reads all of it.
    """

    parsing: Callable[[object], Any]
    _head = 0
    _left = 0  # of a body whose length is known
    _inflow: Inflow | None = None  # of the body that the parser sees no more of

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin."""
        self.parser = self.parsing(self)
        super().connection_made(transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the system may write what came."""
        if self._inflow is None or self.transport.is_closing():
            return SCRATCH
        return self._inflow.rest or SCRATCH[: self._left]

    def buffer_updated(self, nbytes: int) -> None:
        """Take in what was written there."""
        if self._inflow is None or self.transport.is_closing():
            self.data_received(bytes(SCRATCH[:nbytes]))
            return
        self._unset_keepalive_if_required()
        self.seen = self.loop.time()
        if self._inflow.rest:
            self._inflow.took(nbytes)
            self._left -= nbytes
        else:
            self.on_body(bytes(SCRATCH[:nbytes]))
        if not self._left:
            self.parser = self.parsing(self)  # the old one waits for a body
            self.on_message_complete()
        self._look_for_head()

    def data_received(self, data: bytes) -> None:
        """Take bytes in, not more than a head may have."""
        self._head += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._head > MAX_HEAD:
            self._end(431, "The headers are too large.")
        elif self._left and not self.pipeline:
            self._inflow = Inflow(partial(self._begin, self.cycle))
            self.scope[INFLOW] = self._inflow

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it, and tell who waits for a body."""
        super().connection_lost(exc)
        if self._inflow is not None:
            self._inflow.lost()

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
        self._head = 0
        super().on_headers_complete()
        fields = dict(self.headers)
        length = fields.get(b"content-length", b"")
        known = b"transfer-encoding" not in fields
        self._left = int(length) if known and length.isdigit() and len(length) <= 18 else 0

    def on_chunk_header(self) -> None:
        """A part of the body follows, or its trailers."""
        self._head = 0

    def on_body(self, body: bytes) -> None:
        """A part of the body came."""
        self._head = 0
        self._left -= min(len(body), self._left)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The next request's head follows."""
        if self.parser.left:
            return  # before the body: what comes next is parsed again
        self._head = self._left = 0
        self._inflow = None
        super().on_message_complete()

    def _begin(self, cycle: Any) -> bytearray:
        """Give a request what has come of its body, and read on."""
        if cycle.disconnected:
            raise Disconnected
        if cycle.waiting_for_100_continue:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            cycle.waiting_for_100_continue = False
        first: bytearray = cycle.body
        cycle.body = bytearray()
        self.flow.resume_reading()
        return first


def connections(http: str, most: int) -> type[asyncio.Protocol]:
    """The class of a server's connections.

    Args:
        http: ``h11`` or ``httptools``.
        most: How many connections there may be.

    Raises:
        ImportError: The parser is not installed.
    """
    own: dict[str, Any] = {"most": most, "spare": {}}
    if http == "h11":
        from uvicorn.protocols.http.h11_impl import H11Protocol

        bases: tuple[type[Any], ...] = _Limits, H11Protocol
    else:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

        from aoft_deploy.serving.transport.parser import Parser

        bases = _LimitedHead, HttpToolsProtocol, asyncio.BufferedProtocol
        own["parsing"] = Parser
    return type("Connection", bases, own)


async def _health_alone(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """In a spare place: answer whether the server lives, and nothing else; then end."""

    async def reply(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (b"connection", b"close")]
        await send(message)

    if scope["path"].startswith("/v2/health/"):
        await app(scope, receive, reply)
        return
    content = orjson.dumps({"error": FULL})
    headers = [
        (b"content-type", b"application/json"),
        (b"retry-after", b"1"),
        (b"content-length", b"%d" % len(content)),
    ]
    await reply({"type": "http.response.start", "status": 503, "headers": headers})
    await reply({"type": "http.response.body", "body": content})


def _plain(status: int, message: str, headers: str = "") -> bytes:
    """A whole response of a connection that ends."""
    content = orjson.dumps({"error": message})
    head = (
        f"HTTP/1.1 {status} \r\nContent-Type: application/json\r\nConnection: close\r\n{headers}"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content
