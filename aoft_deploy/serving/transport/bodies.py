"""Reading request bodies: limits on the bytes of one, on its time, and on the bytes of all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from aoft_deploy.serving.deadlines import Deadlines
from aoft_deploy.serving.protocol.refusals import Refusal, shown
from aoft_deploy.serving.transport.inflow import Disconnected, Inflow, place

__all__ = ["Bodies", "Receive"]

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
DRAIN_SECONDS = 1.0
"""How long a body that is on its way when the server drains may still take."""


class Bodies:
    """Bodies of all requests of a process.

    Attributes:
        bytes: What all bodies in memory take together.

    Args:
        limit: Bytes of one body.
        total: Bytes of all.
        seconds: Time for one to arrive.
    """

    def __init__(self, limit: int, total: int, seconds: float) -> None:
        self.limit, self.total, self.seconds = limit, total, seconds
        self.bytes = 0
        self._deadlines = Deadlines()
        self._draining = False

    def drain(self) -> None:
        """Let bodies that are half sent come to an end soon."""
        self._draining = True
        self._deadlines.shorten(DRAIN_SECONDS)

    async def read(
        self, receive: Receive, length: str | None, inflow: Inflow | None = None
    ) -> bytes | memoryview:
        """A whole body. Its bytes count until :meth:`release` is told of them.

        Args:
            receive: ASGI's.
            length: The header ``Content-Length``.
            inflow: A shorter way than ``receive``, where the connection has one.

        Raises:
            Refusal: 413 for too many bytes, 408 for too slow ones, 429 where all bodies together
                are too many, 400 for a length that is no number.
            Disconnected: The client has gone.
        """
        if length is not None and not (length.isascii() and length.isdecimal()):
            raise Refusal(400, f"Content-Length is {shown(length)}: give a number.", close=True)
        if length is not None and (len(length) > 18 or int(length) > self.limit):
            raise self._too_large()
        task = asyncio.current_task()
        assert task is not None
        late, came = False, 0

        def give_up() -> None:
            nonlocal late
            late = True
            task.cancel()

        def arrived(size: int) -> None:
            nonlocal came
            came += size
            self.bytes += size
            if came > self.limit:
                raise self._too_large()
            if self.bytes > self.total:
                after = {"Retry-After": "1"}
                raise Refusal(429, "Too many bytes are under way.", headers=after, close=True)

        seconds = min(self.seconds, DRAIN_SECONDS) if self._draining else self.seconds
        self._deadlines.add(task, seconds, give_up)
        try:
            if inflow is None or length is None:
                return await _collected(receive, arrived)
            body = place(int(length))
            await inflow.fill(body, arrived)
            return body
        except BaseException as error:
            self.bytes -= came
            if late and isinstance(error, asyncio.CancelledError):
                task.uncancel()
                raise Refusal(408, "The body did not arrive in time.", close=True) from None
            raise
        finally:
            self._deadlines.discard(task)

    def release(self, size: int) -> None:
        """A body of that size is in memory no more."""
        self.bytes -= size

    def _too_large(self) -> Refusal:
        return Refusal(413, f"The body has more than {self.limit} bytes.", close=True)


async def _collected(receive: Receive, arrived: Callable[[int], None]) -> bytes:
    parts: list[bytes] = []
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        part = message.get("body", b"")
        more = message.get("more_body", False)
        parts.append(part)
        arrived(len(part))
    return parts[0] if len(parts) == 1 else b"".join(parts)
