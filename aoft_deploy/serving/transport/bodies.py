"""Reading request bodies, with limits on the size of each, on its time, and on the total size."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from aoft_deploy.serving.deadlines import Deadlines
from aoft_deploy.serving.protocol.refusals import Refusal
from aoft_deploy.serving.transport.inflow import Disconnected, Inflow, buffer
from aoft_deploy.texts import shortened

__all__ = ["Bodies", "Receive"]

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
DRAIN_SECONDS = 1.0
"""Maximum seconds for the rest of a body when the server drains."""


class Bodies:
    """Reads the bodies of all requests of a server, and accounts for their memory.

    Attributes:
        bytes: Total bytes of all bodies in memory.

    Args:
        limit: Maximum bytes of one body.
        total: Maximum bytes of all bodies.
        seconds: Maximum seconds for a body to arrive.
    """

    def __init__(self, limit: int, total: int, seconds: float) -> None:
        self.limit, self.total, self.seconds = limit, total, seconds
        self.bytes = 0
        self._deadlines = Deadlines()
        self._draining = False

    def drain(self) -> None:
        """Shorten the time of bodies that are still arriving."""
        self._draining = True
        self._deadlines.shorten(DRAIN_SECONDS)

    async def read(
        self, receive: Receive, length: str | None, inflow: Inflow | None = None
    ) -> bytes | memoryview:
        """Read a whole body. Its bytes are accounted for until :meth:`release` is called.

        Args:
            receive: ASGI's ``receive``.
            length: The header ``Content-Length``.
            inflow: Reads the body without ``receive``, if the connection supports it.

        Raises:
            Refusal: 413 if the body is too large, 408 if it is too slow, 429 if all bodies together
                are too large, 400 if the length is not a number.
            Disconnected: The client has disconnected.
        """
        if length is not None and not (length.isascii() and length.isdecimal()):
            raise Refusal(400, f"Content-Length is {shortened(length)}: give a number.", close=True)
        if length is not None and (len(length) > 18 or int(length) > self.limit):
            raise self._too_large()
        task = asyncio.current_task()
        assert task is not None
        timed_out, received = False, 0

        def time_out() -> None:
            nonlocal timed_out
            timed_out = True
            task.cancel()

        def account(size: int) -> None:
            nonlocal received
            received += size
            self.bytes += size
            if received > self.limit:
                raise self._too_large()
            if self.bytes > self.total:
                message = "The server holds too many bytes of requests."
                raise Refusal(429, message, retry_after=1, close=True)

        seconds = min(self.seconds, DRAIN_SECONDS) if self._draining else self.seconds
        self._deadlines.add(task, seconds, time_out)
        try:
            if inflow is None or length is None:
                return await _collect(receive, account)
            body = buffer(int(length))
            await inflow.fill(body, account)
            return body
        except BaseException as error:
            self.bytes -= received
            if timed_out and isinstance(error, asyncio.CancelledError):
                task.uncancel()
                raise Refusal(408, "The body did not arrive in time.", close=True) from None
            raise
        finally:
            self._deadlines.discard(task)

    def release(self, size: int) -> None:
        """Release the bytes accounted to one body."""
        self.bytes -= size

    def _too_large(self) -> Refusal:
        return Refusal(413, f"The body has more than {self.limit} bytes.", close=True)


async def _collect(receive: Receive, account: Callable[[int], None]) -> bytes:
    parts: list[bytes] = []
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        part = message.get("body", b"")
        more = message.get("more_body", False)
        parts.append(part)
        account(len(part))
    return parts[0] if len(parts) == 1 else b"".join(parts)
