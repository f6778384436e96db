"""uvicorn's connections with limits on their number and on the time of a request's head."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

from aoft_deploy.serving.protocol.refusals import error_body
from aoft_deploy.serving.transport.closing import Closing
from aoft_deploy.serving.transport.descriptors import SPARE
from aoft_deploy.serving.transport.spare_places import FULL, health_only

__all__ = ["LimitedConnection"]

HEAD_SECONDS = 10.0
"""Maximum seconds for a request's head, from its first byte or the start of the connection."""

SPARE_SECONDS = 1.0
"""The same limit in a spare place."""

if TYPE_CHECKING:

    class UvicornConnection(asyncio.Protocol):
        """The members that uvicorn's ``H11Protocol`` and ``HttpToolsProtocol`` share."""

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
    UvicornConnection = object


class LimitedConnection(UvicornConnection):
    """A connection that ends if no request arrives, or if there are too many connections.

    Attributes:
        most: Maximum number of connections, without those in spare places.
        spare: Connections in spare places, the oldest first.
        seen: Time of the last event, by the event loop's clock.
    """

    most = 1024
    spare: dict[LimitedConnection, None]
    seen = 0.0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the connection, in a spare place if there are too many."""
        super().connection_made(Closing(transport, self.loop))  # type: ignore[arg-type]
        self.seen = self.loop.time()
        if len(self.connections) > self.most:
            self._take_spare_place()
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Parse bytes; a violation of HTTP ends the connection."""
        if self.transport.is_closing():
            self.transport.discard(len(data))
            return
        self.seen = self.loop.time()
        super().data_received(data)
        self._update_head_timer()

    def on_response_complete(self) -> None:
        """Note the end of an answer."""
        self.seen = self.loop.time()
        super().on_response_complete()

    def close_if_quiet(self, since: float) -> None:
        """Close the connection if it is idle and nothing happened after this time."""
        if self.idle and self.seen <= since:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Release the connection."""
        self._cancel_head_timer()
        self._unset_keepalive_if_required()  # uvicorn omits this if the client reset the connection
        self.spare.pop(self, None)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer a violation of HTTP in the protocol's form."""
        self.refuse(400, msg)

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or bool(self.cycle.response_complete)

    def refuse(self, status: int, message: str) -> None:
        """End the connection with an error, unless an answer has begun."""
        if self.idle or not self.cycle.response_started:
            retry = "Retry-After: 1\r\n" if status == 503 else ""
            self.transport.write(_response(status, message, retry))
        self.transport.close()

    def _update_head_timer(self) -> None:
        """Time the next request's head, unless a request is being answered."""
        if self.idle:
            self._expect_head()
        else:
            self._cancel_head_timer()

    def _take_spare_place(self) -> None:
        self.app = partial(health_only, self.app)
        self.spare[self] = None
        if len(self.spare) > SPARE:
            oldest = next(iter(self.spare))
            del self.spare[oldest]
            oldest.refuse(503, FULL)
            oldest.transport.end()  # without waiting for the client: its descriptor is needed

    def _expect_head(self) -> None:
        if self._head_timer is None:
            seconds = SPARE_SECONDS if self in self.spare else HEAD_SECONDS
            self._head_timer = self.loop.call_later(seconds, self._time_out)

    def _cancel_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _time_out(self) -> None:
        if self.idle and not self.transport.is_closing():
            if self in self.spare:
                self.refuse(503, FULL)
            self.transport.close()


def _response(status: int, message: str, headers: str = "") -> bytes:
    """A whole response, after which the connection ends."""
    content = error_body(message)
    head = (
        f"HTTP/1.1 {status} \r\nContent-Type: application/json\r\nConnection: close\r\n{headers}"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content
