"""Request bodies of known length, received directly into their buffer without a copy.

uvicorn passes a body on in parts: its parser copies each part, so does its buffer and the code that
joins the parts, and each part wakes the request's task. Here the parser sees only the part of the
body that arrives together with the head; the system writes the rest directly into the buffer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np

__all__ = ["INFLOW", "Disconnected", "Inflow", "buffer"]

INFLOW = "aoft.inflow"
"""Key of the request's inflow in the ASGI scope."""

ALIGNMENT = 64


class Disconnected(Exception):
    """The client has disconnected."""


def buffer(size: int) -> memoryview:
    """Memory for a body, neither cleared nor used before bytes arrive.

    Its end is aligned, since tensors are at the end of bodies.
    """
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -(memory.__array_interface__["data"][0] + size) % ALIGNMENT
    return memory.data[start : start + size]


class Inflow:
    """Receives a request's body from its connection into a buffer.

    Args:
        begin: Returns the part of the body that has arrived, and resumes reading.
    """

    def __init__(self, begin: Callable[[], bytes | bytearray]) -> None:
        self._begin = begin
        self._filled: asyncio.Future[None] | None = None
        self._remaining = memoryview(b"")
        self._account: Callable[[int], object] = int

    @property
    def remaining(self) -> memoryview:
        """The part of the buffer that is not filled yet; empty unless ``fill`` is waiting."""
        return self._remaining

    async def fill(self, body: memoryview, account: Callable[[int], object]) -> None:
        """Wait until a buffer of the body's length is full.

        Args:
            body: The buffer.
            account: Called with the size of each part when it arrives.

        Raises:
            Disconnected: The client has disconnected.
            Exception: Whatever ``account`` raises.
        """
        first = self._begin()
        account(len(first))
        body[: len(first)] = first
        if len(first) == len(body):
            return
        self._remaining, self._account = body[len(first) :], account
        self._filled = asyncio.get_running_loop().create_future()
        try:
            await self._filled
        finally:
            self._remaining, self._filled = memoryview(b""), None

    def written(self, size: int) -> None:
        """Note that the connection wrote bytes to :attr:`remaining`."""
        assert self._filled is not None
        self._remaining = self._remaining[size:]
        if self._filled.done():
            return
        try:
            self._account(size)
        except Exception as error:
            self._remaining = memoryview(b"")
            self._filled.set_exception(error)
            return
        if not self._remaining:
            self._filled.set_result(None)

    def disconnected(self) -> None:
        """Note that the client has disconnected."""
        if self._filled is not None and not self._filled.done():
            self._filled.set_exception(Disconnected())
