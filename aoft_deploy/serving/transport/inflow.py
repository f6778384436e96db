"""Bodies of known length, from the socket to their place without a copy between.

uvicorn hands bodies on in parts: its parser copies what the socket gave, its buffer does, whoever
joins the parts does, and each part wakes the request's task. Here the parser sees only what came
together with the head; all that follows the system writes where it belongs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np

__all__ = ["INFLOW", "Disconnected", "Inflow", "place"]

INFLOW = "aoft.inflow"
"""Key of the ASGI scope under which a request finds its own."""

ALIGNMENT = 64


class Disconnected(Exception):
    """The client has gone."""


def place(size: int) -> memoryview:
    """Memory for a body, neither cleared nor touched before bytes arrive.

    It ends at a round address, since tensors stand at the end of bodies.
    """
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -(memory.__array_interface__["data"][0] + size) % ALIGNMENT
    return memory.data[start : start + size]


class Inflow:
    """What a request has of its connection: the way to have its body written to a place.

    Args:
        begin: Gives up what has come so far, and has the connection read on.
    """

    def __init__(self, begin: Callable[[], bytes | bytearray]) -> None:
        self._begin = begin
        self._filled: asyncio.Future[None] | None = None
        self._rest = memoryview(b"")
        self._arrived: Callable[[int], object] = int

    @property
    def rest(self) -> memoryview:
        """Where the next bytes belong; empty while nobody waits for any."""
        return self._rest

    async def fill(self, room: memoryview, arrived: Callable[[int], object]) -> None:
        """Wait until a place of the body's length is full.

        Args:
            room: The place.
            arrived: Told of every part's size before the next; what it raises is raised here.

        Raises:
            Disconnected: The client has gone.
            Exception: Whatever ``arrived`` raises.
        """
        first = self._begin()
        arrived(len(first))
        room[: len(first)] = first
        if len(first) == len(room):
            return
        self._rest, self._arrived = room[len(first) :], arrived
        self._filled = asyncio.get_running_loop().create_future()
        try:
            await self._filled
        finally:
            self._rest, self._filled = memoryview(b""), None

    def took(self, size: int) -> None:
        """So many bytes were written to :attr:`rest`."""
        assert self._filled is not None
        self._rest = self._rest[size:]
        if self._filled.done():
            return
        try:
            self._arrived(size)
        except Exception as error:
            self._rest = memoryview(b"")
            self._filled.set_exception(error)
            return
        if not self._rest:
            self._filled.set_result(None)

    def lost(self) -> None:
        """The client has gone."""
        if self._filled is not None and not self._filled.done():
            self._filled.set_exception(Disconnected())
