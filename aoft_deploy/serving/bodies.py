"""Reading request bodies: limits on the bytes of one, on its time, and on the bytes of all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from aoft_deploy.serving.refusals import Refusal, shown

__all__ = ["Bodies", "Disconnected", "Receive"]

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
DRAIN_SECONDS = 1.0
"""How long a body that is on its way when the server drains may still take."""


class Disconnected(Exception):
    """The client has gone."""


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
        self._reading: set[asyncio.Timeout] = set()
        self._draining = False

    def drain(self) -> None:
        """Let bodies that are half sent come to an end soon."""
        self._draining = True
        soon = asyncio.get_running_loop().time() + DRAIN_SECONDS
        for timeout in self._reading:
            when = timeout.when()
            timeout.reschedule(soon if when is None else min(soon, when))

    async def read(self, receive: Receive, headers: Mapping[str, str]) -> bytes:
        """A whole body. Its bytes count until :meth:`release` is told of them.

        Args:
            receive: ASGI's.
            headers: Of the request.

        Raises:
            Refusal: 413 for too many bytes, 408 for too slow ones, 429 where all bodies together
                are too many, 400 for a length that is no number.
            Disconnected: The client has gone.
        """
        length = headers.get("content-length")
        if length is not None and not (length.isascii() and length.isdecimal()):
            raise Refusal(400, f"Content-Length is {shown(length)}: give a number.", close=True)
        if length is not None and (len(length) > 18 or int(length) > self.limit):
            raise self._too_large()
        parts: list[bytes] = []
        size, done = 0, False
        seconds = min(self.seconds, DRAIN_SECONDS) if self._draining else self.seconds
        try:
            async with asyncio.timeout(seconds) as timeout:
                self._reading.add(timeout)
                try:
                    more = True
                    while more:
                        message = await receive()
                        if message["type"] == "http.disconnect":
                            raise Disconnected
                        part = message.get("body", b"")
                        more = message.get("more_body", False)
                        size += len(part)
                        self.bytes += len(part)
                        parts.append(part)
                        if size > self.limit:
                            raise self._too_large()
                        if self.bytes > self.total:
                            after = {"Retry-After": "1"}
                            raise Refusal(
                                429, "Too many bytes are under way.", headers=after, close=True
                            )
                finally:
                    self._reading.discard(timeout)
            done = True
        except TimeoutError:
            raise Refusal(408, "The body did not arrive in time.", close=True) from None
        finally:
            if not done:
                self.bytes -= size
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def release(self, size: int) -> None:
        """A body of that size is in memory no more."""
        self.bytes -= size

    def _too_large(self) -> Refusal:
        return Refusal(413, f"The body has more than {self.limit} bytes.", close=True)
