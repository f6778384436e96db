"""Connections of both HTTP parsers, in this process: headers that do not come, and their end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn

from aoft_deploy.serving.connections import connections

SECONDS = 0.3
REQUEST = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
UPLOAD = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n"
OPENINGS = {
    "nothing": b"",
    "half a head": REQUEST[:-2],
    "a byte": b"G",
    "half a second head": REQUEST + b"!" + REQUEST[:-2],
    "a byte of a second head": REQUEST + b"!" + b"G",
    "half of a body that nobody waits for": UPLOAD + b"!" + b"a" * 9,
}
"""What a client sends; where there is a ``!`` it waits for an answer."""


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Answers without a look at the body."""
    headers = [(b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture(params=["httptools", "h11"])
def listening(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server of such connections, with little patience."""
    monkeypatch.setattr("aoft_deploy.serving.connections.HEADER_SECONDS", SECONDS)
    make: Any = connections(request.param, 100)
    config = uvicorn.Config(application, http=make, log_config=None, lifespan="off")
    config.load()
    state = uvicorn.server.ServerState()

    @asynccontextmanager
    async def serving() -> Any:
        server = await asyncio.get_running_loop().create_server(
            lambda: make(config=config, server_state=state, app_state={}), "127.0.0.1", 0
        )
        async with server:
            yield server.sockets[0].getsockname()[1]
        async with asyncio.timeout(10):
            while state.connections:
                await asyncio.sleep(0.01)

    return serving


def play(listening: Any, part: Callable[[int], Awaitable[None]]) -> None:
    async def run() -> None:
        async with listening() as port:
            await asyncio.wait_for(part(port), 10)

    asyncio.run(run())


DRIPS = ["half a head", "half a second head", "half of a body that nobody waits for"]


@pytest.mark.parametrize(
    ("name", "drips"), [*((name, False) for name in OPENINGS), *((name, True) for name in DRIPS)]
)
def test_a_connection_whose_headers_do_not_come_ends(
    listening: Any, name: str, drips: bool
) -> None:
    async def part(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        first, waits, rest = OPENINGS[name].partition(b"!")
        writer.write(first)
        if waits:
            await reader.readuntil(b"ok")
        writer.write(rest)
        start = time.monotonic()
        ended = asyncio.create_task(reader.read())
        while not ended.done():
            if drips:
                writer.write(b"a")
            await asyncio.wait({ended}, timeout=SECONDS / 10)
        assert await ended == b""
        assert SECONDS / 2 < time.monotonic() - start < SECONDS + 2
        writer.close()

    play(listening, part)


def test_a_connection_that_is_idle_between_requests_stays(listening: Any) -> None:
    async def part(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for seconds in (2 * SECONDS, SECONDS / 2, 0, 2 * SECONDS):
            writer.write(REQUEST[:9])
            await asyncio.sleep(SECONDS / 10)
            writer.write(REQUEST[9:])
            await reader.readuntil(b"ok")
            await asyncio.sleep(seconds)
        writer.write(UPLOAD + b"a" * 99 + REQUEST)
        await reader.readuntil(b"ok")
        await reader.readuntil(b"ok")
        writer.close()
        await writer.wait_closed()
        await asyncio.sleep(0)

    play(listening, part)
