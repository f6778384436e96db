"""The record of one HTTP request, and the cancellation of its work when the client disconnects."""

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
"""Maximum number of headers of a request."""

WATCH_AFTER = 0.05
"""Seconds after which a request watches for the disconnect of its client."""

_process = secrets.token_hex(4)
_counter = itertools.count(1)


class Call:
    """The record of one request: its headers, its identity and the state of its body.

    Attributes:
        count: Number of its headers.
        headers: Headers by name in lower case.
        id: Identifies the request in answer and log; the client's ``X-Request-Id`` or a new one.
        inflow: Reads the body without ASGI's ``receive``, if the connection supports it.
        method: HTTP method.
        model: Name of the model once it is found; None before.
        start: Time of its start from ``perf_counter``.
        body: Bytes accounted to its body.
        read: Whether the body was read to its end.
    """

    __slots__ = ("body", "count", "headers", "id", "inflow", "method", "model", "read", "start")

    def __init__(self, scope: MutableMapping[str, Any]) -> None:
        self.inflow: Inflow | None = scope.get(INFLOW)
        self.method: str = scope["method"]
        self.count = len(scope["headers"])
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        request_id = self.headers.get(b"x-request-id")
        if request_id is not None and re.fullmatch(rb"[\w.:\-]{1,128}", request_id):
            self.id = request_id.decode()
        else:
            self.id = f"{_process}-{next(_counter)}"
        self.model: str | None = None
        self.start = time.perf_counter()
        self.body, self.read = 0, False

    def check(self) -> None:
        """Refuse requests that another server or proxy might read differently.

        Raises:
            Refusal: 400: the end of its body is ambiguous, or it switches to another protocol; 431:
                it has too many headers.
        """
        if self.method in ("CONNECT", "PRI"):  # a tunnel; HTTP/2
            message = (
                f"{self.method} is not supported: this server speaks HTTP/1.1, not as a proxy."
            )
            raise Refusal(400, message, close=True)
        if b"content-length" in self.headers and b"transfer-encoding" in self.headers:
            raise Refusal(400, "Both Content-Length and Transfer-Encoding: give one.", close=True)
        if self.count > MAX_HEADERS:
            raise Refusal(431, f"There are more than {MAX_HEADERS} headers.", close=True)

    def header(self, name: bytes) -> str | None:
        """The text of a header; None if there is none."""
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")


class Departure:
    """Context manager: cancels the request when the client disconnects.

    Watching costs an asyncio task, so it starts only for requests that take longer than most.

    Args:
        receive: ASGI's ``receive``, after the whole body was read.
        deadlines: Starts the watch.

    Raises:
        Disconnected: The client has disconnected.
    """

    def __init__(self, receive: Receive, deadlines: Deadlines) -> None:
        self._receive, self._deadlines = receive, deadlines
        self._disconnected = False
        self._watcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.current_task()
        self._deadlines.add(self, WATCH_AFTER, self._start_watching)
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
        if kind is asyncio.CancelledError and self._disconnected:
            assert self._task is not None
            self._task.uncancel()
            raise Disconnected from None

    def _start_watching(self) -> None:
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._disconnected = True
        assert self._task is not None
        self._task.cancel()
