"""One HTTP request on its way through the server, from its headers to its line in the log."""

from __future__ import annotations

import asyncio
import itertools
import re
import secrets
import time
from collections.abc import MutableMapping
from types import TracebackType
from typing import Any, Self

from aoft_deploy.serving.deadlines import Deadlines
from aoft_deploy.serving.protocol.refusals import Refusal
from aoft_deploy.serving.transport.bodies import Receive
from aoft_deploy.serving.transport.inflow import INFLOW, Disconnected, Inflow

__all__ = ["MAX_HEADERS", "Call", "Departure"]

MAX_HEADERS = 256
"""Of one request."""

_process = secrets.token_hex(4)
_numbers = itertools.count(1)
WATCH_AFTER = 0.05
"""Seconds after which it is looked whether the client still waits."""


class Call:
    """What is known of a request beside its content.

    Attributes:
        count: Of its headers.
        headers: By name in lower case.
        id: Of this request, the client's own or ours; in answer and log.
        inflow: The short way of its body, where the connection has one.
        method: HTTP's.
        model: Name of the model, once it is known that there is one.
        start: When it began, by ``perf_counter``.
        body: Bytes of its body that count as in memory.
        read: Whether the body was read to its end.
    """

    __slots__ = ("body", "count", "headers", "id", "inflow", "method", "model", "read", "start")

    def __init__(self, scope: MutableMapping[str, Any]) -> None:
        self.inflow: Inflow | None = scope.get(INFLOW)
        self.method: str = scope["method"]
        self.count = len(scope["headers"])
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        wanted = self.headers.get(b"x-request-id")
        if wanted is not None and re.fullmatch(rb"[\w.:\-]{1,128}", wanted):
            self.id = wanted.decode()
        else:
            self.id = f"{_process}-{next(_numbers)}"
        self.model: str | None = None
        self.start = time.perf_counter()
        self.body, self.read = 0, False

    def check(self) -> None:
        """Whether every server would read the same request.

        Raises:
            Refusal: 400: it says in two ways where its body ends, of which a proxy may believe the
                other, or wants another protocol to follow; 431: it has too many headers.
        """
        if self.method in ("CONNECT", "PRI"):  # a tunnel; HTTP/2
            message = f"{self.method} is not offered: this server speaks HTTP/1.1, and is no proxy."
            raise Refusal(400, message, close=True)
        if b"content-length" in self.headers and b"transfer-encoding" in self.headers:
            raise Refusal(400, "Both Content-Length and Transfer-Encoding: give one.", close=True)
        if self.count > MAX_HEADERS:
            raise Refusal(431, f"There are more than {MAX_HEADERS} headers.", close=True)

    def header(self, name: bytes) -> str | None:
        """A header's text; None where there is none."""
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")


class Departure:
    """Ends what is done within it when the client goes away.

    Looking costs a task, so it begins only with requests that take longer than most.

    Args:
        receive: ASGI's, after the whole body was read.
        deadlines: When to look.
    """

    def __init__(self, receive: Receive, deadlines: Deadlines) -> None:
        self._receive, self._deadlines = receive, deadlines
        self._gone = False
        self._watcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.current_task()
        self._deadlines.add(self, WATCH_AFTER, self._watch)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._deadlines.discard(self)
        if self._watcher is not None:
            self._watcher.cancel()
        if kind is asyncio.CancelledError and self._gone:
            assert self._task is not None
            self._task.uncancel()
            raise Disconnected from None

    def _watch(self) -> None:
        self._watcher = asyncio.get_running_loop().create_task(self._wait())

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        assert self._task is not None
        self._task.cancel()
