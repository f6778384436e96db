"""Bodies received into their buffer arrive as sent, for any packet boundaries."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st

from aoft_deploy.serving.protocol.refusals import Refusal
from aoft_deploy.serving.transport.bodies import Bodies
from aoft_deploy.serving.transport.connections import connection_class
from aoft_deploy.serving.transport.inflow import INFLOW, Disconnected, Inflow, buffer

Scenario = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]


class Echo:
    """Answers a request with its body; on some paths it stops reading early."""

    def __init__(self, bodies: Bodies) -> None:
        self.bodies = bodies
        self.outcomes: list[str] = []
        self.straight = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers, status = dict(scope["headers"]), 200
        length = headers.get(b"content-length", b"").decode() or None
        inflow = scope.get(INFLOW)
        self.straight += inflow is not None
        if scope["path"] == "/late":  # the body arrives while nothing waits for it
            await asyncio.sleep(0.05)
        try:
            body = b"ignored"
            if scope["path"] != "/ignore":
                body = bytes(await self.bodies.read(receive, length, inflow))
                self.bodies.release(len(body))
        except Disconnected:
            self.outcomes.append("gone")
            return
        except Refusal as refusal:
            status, body = refusal.status, refusal.message.encode()
            more = True
            while more:
                message = await receive()
                more = message["type"] == "http.request" and message["more_body"]
        self.outcomes.append(str(status))
        lengths = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": lengths})
        await send({"type": "http.response.body", "body": body})


def run_client(scenario: Scenario, bodies: Bodies | None = None) -> Echo:
    """Run a client against a server with these connections."""
    echo = Echo(bodies or Bodies(10**7, 10**8, 5.0))

    async def run() -> None:
        make: Any = connection_class("httptools", 100)
        config = uvicorn.Config(echo, http=make, lifespan="off")
        config.load()
        state = uvicorn.server.ServerState()
        loop = asyncio.get_running_loop()

        def protocol() -> Any:
            return make(config=config, server_state=state, app_state={})

        server = await loop.create_server(protocol, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        async with asyncio.timeout(20):
            await scenario(reader, writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        async with asyncio.timeout(5):
            while state.tasks:
                await asyncio.sleep(0.01)
        server.close()

    asyncio.run(run())
    assert echo.bodies.bytes == 0
    return echo


def head(body: bytes, path: str = "/", more: str = "") -> bytes:
    text = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    return text.encode()


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    top = await reader.readuntil(b"\r\n\r\n")
    length = int(top.lower().partition(b"content-length: ")[2].split()[0])
    return int(top.split()[1]), await reader.readexactly(length)


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def cut(data: bytes, cuts: list[int]) -> Iterator[bytes]:
    edges = [0, *sorted(c % (len(data) + 1) for c in cuts), len(data)]
    return (data[a:b] for a, b in itertools.pairwise(edges))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 100, 65535, 65536, 65537, 300_000]), max_size=4),
    cuts=st.lists(st.integers(0, 10**6), max_size=6),
    path=st.sampled_from(["/", "/late"]),
)
def test_pipelined_requests_are_answered_for_any_packet_boundaries(
    sizes: list[int], cuts: list[int], path: str
) -> None:
    sent = [noise(size, seed) for seed, size in enumerate(sizes)]

    async def scenario(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in cut(b"".join(head(body, path) + body for body in sent), cuts):
            writer.write(part)
            await asyncio.sleep(0.001)
        for body in sent:
            assert await answer(reader) == (200, body)

    run_client(scenario)


def test_large_bodies_are_received_without_a_copy() -> None:
    async def scenario(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for seed in range(3):
            body = noise(1_000_000, seed)
            writer.write(head(body))
            await asyncio.sleep(0.02)
            writer.write(body)
            assert await answer(reader) == (200, body)

    assert run_client(scenario).straight == 3


def test_a_chunked_body_after_one_of_known_length() -> None:
    async def scenario(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = noise(200_000)
        writer.write(head(body) + body)
        assert await answer(reader) == (200, body)
        top = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        writer.write(top + b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n")
        assert await answer(reader) == (200, body)
        writer.write(head(body) + body)
        assert await answer(reader) == (200, body)

    run_client(scenario)


def test_expect_100_continue_is_answered() -> None:
    async def scenario(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = noise(100_000)
        writer.write(head(body, more="Expect: 100-continue\r\n"))
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        assert await answer(reader) == (200, body)

    assert run_client(scenario).straight == 1


def test_a_disconnect_in_the_middle_of_a_body_is_noticed() -> None:
    async def scenario(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head(b"a" * 500_000) + b"a" * 300_000)
        await asyncio.sleep(0.1)

    assert run_client(scenario).outcomes == ["gone"]


def test_the_total_size_of_arriving_bodies_is_limited() -> None:
    async def scenario(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = noise(900_000)
        writer.write(head(body) + body)
        status, message = await answer(reader)
        assert (status, message) == (429, b"The server holds too many bytes of requests.")
        writer.write(head(b"next") + b"next")
        assert await answer(reader) == (200, b"next")

    run_client(scenario, Bodies(10**6, 500_000, 5.0))


def test_a_slow_body_is_refused_and_the_rest_of_it_is_read() -> None:
    async def scenario(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = noise(300_000)
        writer.write(head(body) + body[:200_000])
        await asyncio.sleep(0.4)
        writer.write(body[200_000:])
        assert await answer(reader) == (408, b"The body did not arrive in time.")
        writer.write(head(body) + body)
        assert await answer(reader) == (200, body)

    run_client(scenario, Bodies(10**6, 10**7, 0.2))


def test_an_unread_body_does_not_reach_the_next_request() -> None:
    async def scenario(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = head(b"evil") + noise(400_000)
        writer.write(head(body, "/ignore"))
        assert await answer(reader) == (200, b"ignored")
        writer.write(body + head(b"good") + b"good")
        assert await answer(reader) == (200, b"good")

    run_client(scenario)


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 602_112, 5_000_000])
def test_a_buffer_ends_at_an_aligned_address(size: int) -> None:
    room = buffer(size)
    assert len(room) == size and not room.readonly
    if size >= 4:
        assert np.frombuffer(room[size % 4 :], np.float32).flags.aligned
    array = np.frombuffer(room, np.uint8)
    assert not size or (array.__array_interface__["data"][0] + size) % 64 == 0


def test_buffers_take_no_memory_before_bytes_arrive() -> None:
    def resident() -> int:
        pages = Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    always = pages.exists() and "[always]" in pages.read_text()  # a byte then takes 2 MB
    before = resident()
    rooms = [buffer(64 * 2**20) for _ in range(32)]
    for room in rooms:
        room[0] = 1
    assert resident() - before < (96 if always else 32) * 2**20
    assert len(rooms) == 32


def test_an_exception_while_accounting_for_a_part_ends_the_wait() -> None:
    async def run() -> None:
        inflow, sizes = Inflow(bytearray), list[int]()

        def arrived(size: int) -> None:
            sizes.append(size)
            if size == 3:
                raise ValueError("three")

        room = buffer(10)
        waiting = asyncio.create_task(inflow.fill(room, arrived))
        await asyncio.sleep(0)
        inflow.remaining[:2] = b"ab"
        inflow.written(2)
        inflow.remaining[:3] = b"cde"
        inflow.written(3)
        assert not inflow.remaining
        with pytest.raises(ValueError, match="three"):
            await waiting
        inflow.disconnected()  # nothing waits for it
        assert sizes == [0, 2, 3] and bytes(room[:5]) == b"abcde"

    asyncio.run(run())
