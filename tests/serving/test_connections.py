"""Connections of both HTTP parsers, in this process: timeouts, limits and shutdown."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import uvicorn
from clock import Clock, settled

from aoft_deploy.serving.transport.closing import LINGER_BYTES, LINGER_SECONDS
from aoft_deploy.serving.transport.connections import connection_class
from aoft_deploy.serving.transport.descriptors import SPARE
from aoft_deploy.serving.transport.limited_connection import HEAD_SECONDS, SPARE_SECONDS
from aoft_deploy.serving.transport.shutdown import (
    QUIET_SECONDS,
    drop_new_connections,
    end_connections,
    stop_listening,
)

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
"""What a client sends; at each ``!`` it waits for an answer."""

MOST = 3
KEEP_ALIVE = 75.0


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Answers without reading the body."""
    headers = [(b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture(params=["httptools", "h11"])
def listening(request: pytest.FixtureRequest) -> Any:
    """A server with these connections: its port, and uvicorn's state."""

    @asynccontextmanager
    async def serving(most: int) -> Any:
        make: Any = connection_class(request.param, most)
        config = uvicorn.Config(
            application,
            http=make,
            log_config=None,
            lifespan="off",
            timeout_keep_alive=KEEP_ALIVE,  # type: ignore[arg-type]
        )
        config.load()
        server = uvicorn.Server(config)
        bound = socket.create_server(("127.0.0.1", 0))
        protocol = partial(make, config=config, server_state=server.server_state, app_state={})
        server.servers = [await asyncio.get_running_loop().create_server(protocol, sock=bound)]
        async with server.servers[0]:
            yield bound.getsockname()[1], server, bound
        async with asyncio.timeout(60):
            while server.server_state.connections:
                await asyncio.sleep(0.01)

    return serving


def run_scenario(
    listening: Any, scenario: Callable[[int, Clock, Any, Any], Awaitable[None]], most: int = 100
) -> None:
    async def run() -> None:
        clock = Clock()
        async with listening(most) as (port, server, bound):
            await scenario(port, clock, server, bound)

    asyncio.run(run())


async def joined(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that the server has accepted."""
    streams = await asyncio.open_connection("127.0.0.1", port)
    await settled()
    return streams


async def ended(reader: asyncio.StreamReader) -> bytes:
    """Everything received before the end of the stream."""
    async with asyncio.timeout(60):
        return await reader.read()


DRIPS = ["half a head", "half a second head", "half of a body that nobody waits for"]


@pytest.mark.parametrize(
    ("name", "drips"), [*((name, False) for name in OPENINGS), *((name, True) for name in DRIPS)]
)
def test_a_connection_without_headers_times_out(listening: Any, name: str, drips: bool) -> None:
    async def scenario(port: int, clock: Clock, server: Any, bound: Any) -> None:
        reader, writer = await joined(port)
        first, waits, rest = OPENINGS[name].partition(b"!")
        writer.write(first)
        if waits:
            await reader.readuntil(b"ok")
        writer.write(rest)
        await settled()
        for _ in range(9):
            await clock.go(HEAD_SECONDS / 10)
            if drips:
                writer.write(b"a")
                await settled()
        assert not reader.at_eof()
        await clock.go(HEAD_SECONDS / 10)
        assert await ended(reader) == b""
        writer.close()

    run_scenario(listening, scenario)


def test_an_idle_connection_stays_for_the_keep_alive_time(listening: Any) -> None:
    async def scenario(port: int, clock: Clock, server: Any, bound: Any) -> None:
        reader, writer = await joined(port)
        for seconds in (2 * HEAD_SECONDS, HEAD_SECONDS / 2, 0, 2 * HEAD_SECONDS):
            writer.write(REQUEST[:9])
            await clock.go(HEAD_SECONDS / 10)
            writer.write(REQUEST[9:])
            await reader.readuntil(b"ok")
            await clock.go(seconds)
        writer.write(UPLOAD + b"a" * 99 + REQUEST)
        await reader.readuntil(b"ok")
        await reader.readuntil(b"ok")
        await settled()
        await clock.go(KEEP_ALIVE - 1)
        assert not reader.at_eof()
        await clock.go(1.5)
        assert await ended(reader) == b""
        writer.close()

    run_scenario(listening, scenario)


def test_a_connection_reset_by_the_client_leaves_no_timer(listening: Any) -> None:
    async def scenario(port: int, clock: Clock, server: Any, bound: Any) -> None:
        reader, writer = await joined(port)
        writer.write(REQUEST)
        await reader.readuntil(b"ok")
        await settled()
        (connection,) = server.server_state.connections
        assert connection.timeout_keep_alive_task is not None
        reset = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        writer.transport.abort()
        async with asyncio.timeout(60):
            while server.server_state.connections:
                await settled()
        assert connection.timeout_keep_alive_task is None

    run_scenario(listening, scenario)


LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n"


def test_a_full_server_answers_health_checks_only(listening: Any) -> None:
    async def scenario(port: int, clock: Clock, server: Any, bound: Any) -> None:
        held = [await joined(port) for _ in range(MOST)]
        for reader, writer in held:
            writer.write(REQUEST)
            assert await reader.readuntil(b"ok")
        for _ in range(2):
            reader, writer = await joined(port)
            writer.write(LIVE)
            found = await ended(reader)
            assert found.startswith(b"HTTP/1.1 200") and found.endswith(b"ok")
            assert b"connection: close" in found
            writer.close()
            reader, writer = await joined(port)
            writer.write(REQUEST)
            found = await ended(reader)
            assert found.startswith(b"HTTP/1.1 503") and b"retry-after: 1" in found
            assert json.loads(found.partition(b"\r\n\r\n")[2]) == {"error": "Too many connections."}
            writer.close()
            await settled()
        for reader, writer in held:  # those within the limit are unaffected
            writer.write(REQUEST)
            assert await reader.readuntil(b"ok")
        for _, writer in held:
            writer.close()
        await settled()
        reader, writer = await joined(port)
        writer.write(REQUEST + REQUEST)
        await reader.readuntil(b"ok")
        await reader.readuntil(b"ok")
        writer.close()

    run_scenario(listening, scenario, MOST)


def test_the_newest_connections_have_the_spare_places(listening: Any) -> None:
    async def scenario(port: int, clock: Clock, server: Any, bound: Any) -> None:
        held = [await joined(port) for _ in range(MOST)]
        silent = [await joined(port) for _ in range(SPARE + 2)]
        for reader, _ in silent[:2]:
            assert (await ended(reader)).startswith(b"HTTP/1.1 503 ")
        assert not any(reader.at_eof() for reader, _ in silent[2:])
        reader, writer = await joined(port)
        writer.write(LIVE)
        assert (await ended(reader)).startswith(b"HTTP/1.1 200")
        assert len(server.server_state.connections) <= MOST + SPARE
        await clock.go(SPARE_SECONDS)
        for reader, _ in silent[3:]:
            assert b'{"error":"Too many connections."}' in await ended(reader)
        assert not any(reader.at_eof() for reader, _ in held)
        writer.close()
        for _, other in [*held, *silent]:
            other.close()

    run_scenario(listening, scenario, MOST)


def test_a_client_that_continues_to_send_receives_the_refusal(listening: Any) -> None:
    """A socket that is closed with unread bytes is reset, and the answer is lost."""

    async def scenario(port: int, clock: Clock, server: Any, bound: Any) -> None:
        reader, writer = await joined(port)
        writer.write(b"GET / HTTP/1.1\r\nno header\r\n\r\n")
        await settled()
        for _ in range(20):
            writer.write(b"more" * 5000)
            await settled()
        assert (await ended(reader)).startswith(b"HTTP/1.1 400 ")
        writer.close()
        await writer.wait_closed()

    run_scenario(listening, scenario)


def test_the_wait_for_a_client_that_keeps_sending_is_bounded(
    listening: Any,
) -> None:
    async def scenario(port: int, clock: Clock, server: Any, bound: Any) -> None:
        last = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        connected = server.server_state.connections
        reader, writer = await joined(port)
        writer.write(last)
        assert (await ended(reader)).endswith(b"ok")
        await clock.go(LINGER_SECONDS / 2)
        assert len(connected) == 1
        await clock.go(LINGER_SECONDS)
        assert not connected
        writer.close()
        reader, writer = await joined(port)
        writer.write(last)
        assert (await ended(reader)).endswith(b"ok")
        sent = 0
        with pytest.raises(ConnectionError):
            while sent < 20 * LINGER_BYTES:
                writer.write(bytes(50_000))
                sent += 50_000
                await writer.drain()
                await settled()
        assert LINGER_BYTES < sent < 20 * LINGER_BYTES and not connected

    run_scenario(listening, scenario)


def test_shutdown_answers_clients_in_use_once_more_and_resets_none(listening: Any) -> None:
    async def scenario(port: int, clock: Clock, server: Any, bound: Any) -> None:
        unused, used, late = [await joined(port) for _ in range(3)]
        for _, writer in (unused, used):
            writer.write(REQUEST)
        for reader, _ in (unused, used):
            await reader.readuntil(b"ok")
        await settled()
        await clock.go(QUIET_SECONDS * 2)
        used[1].write(REQUEST)
        await used[0].readuntil(b"ok")
        ending = asyncio.create_task(end_connections(server))
        await settled()
        assert await ended(unused[0]) == b"" and await ended(late[0]) == b""
        late[1].write(REQUEST)  # arrives during the shutdown: neither answered nor reset
        await settled()
        await clock.go(QUIET_SECONDS * 0.9)
        used[1].write(REQUEST)
        await used[0].readuntil(b"ok")
        assert not ending.done()
        for _, writer in (unused, late):
            writer.close()
            await writer.wait_closed()
        await clock.go(QUIET_SECONDS)
        assert await ended(used[0]) == b""
        used[1].close()
        await ending
        assert not server.server_state.connections

    run_scenario(listening, scenario)


def test_shutdown_does_not_wait_for_clients_that_never_close(listening: Any) -> None:
    async def scenario(port: int, clock: Clock, server: Any, bound: Any) -> None:
        held = [await joined(port) for _ in range(5)]
        ending = asyncio.create_task(end_connections(server))
        for _ in range(30):
            await clock.go(0.1)
        async with asyncio.timeout(60):
            await ending
        await settled()
        assert not server.server_state.connections
        for _, writer in held:
            writer.close()

    run_scenario(listening, scenario)


def test_connections_in_the_backlog_are_answered_when_the_socket_closes(listening: Any) -> None:
    async def scenario(port: int, clock: Clock, server: Any, bound: Any) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(bound.fileno())  # the server is busy
        waiting = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        for client in waiting:
            client.sendall(REQUEST)
        await stop_listening(server, bound)
        for client in waiting:
            client.setblocking(False)
            found = await asyncio.wait_for(loop.sock_recv(client, 9999), 60)
            assert found.startswith(b"HTTP/1.1 200")
            client.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))

    run_scenario(listening, scenario)


def test_new_connections_are_dropped_while_established_ones_are_accepted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        early = socket.create_connection(bound.getsockname())
        drop_new_connections(bound)
        with socket.socket() as late:
            late.settimeout(0.3)
            with pytest.raises(TimeoutError):  # neither accepted nor reset: the client tries again
                late.connect(bound.getsockname())
        accepted, _ = bound.accept()
        early.sendall(b"hello")
        assert accepted.recv(9) == b"hello"
        bound.setblocking(False)
        with pytest.raises(BlockingIOError):
            bound.accept()
        early.close()
        accepted.close()
