"""Reading request bodies within limits on size, time and total memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from aoft_deploy.serving.protocol.refusals import Refusal
from aoft_deploy.serving.transport.bodies import Bodies
from aoft_deploy.serving.transport.inflow import Disconnected


def receiving(*parts: bytes, delay: float = 0.0, ends: bool = True) -> Callable[[], Any]:
    left = list(parts)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(delay)
        if not left:
            if ends:
                return {"type": "http.disconnect"}
            await asyncio.sleep(60)
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left) or not ends}

    return receive


def read(bodies: Bodies, receive: Callable[[], Any], length: str | None = None) -> bytes:
    return bytes(asyncio.run(bodies.read(receive, length)))


def test_a_body_is_accounted_for_until_it_is_released() -> None:
    bodies = Bodies(10, 15, 1.0)
    assert read(bodies, receiving(b"abc", b"", b"def"), "6") == b"abcdef"
    assert bodies.bytes == 6
    with pytest.raises(Refusal, match="holds too many bytes") as caught:
        read(bodies, receiving(b"0123456789"))
    assert caught.value.status == 429 and caught.value.close and bodies.bytes == 6
    bodies.release(6)
    assert read(bodies, receiving(b"0123456789")) == b"0123456789"


@pytest.mark.parametrize("length", ["11", "1000000000000", "9" * 5000, None])
def test_a_large_body_is_refused_as_early_as_possible(length: str | None) -> None:
    bodies, read_parts = Bodies(10, 100, 1.0), list[bytes]()

    async def receive() -> dict[str, Any]:
        read_parts.append(b"12345")
        return {"type": "http.request", "body": b"12345", "more_body": True}

    with pytest.raises(Refusal, match="more than 10 bytes") as caught:
        read(bodies, receive, length)
    assert caught.value.status == 413 and caught.value.close and bodies.bytes == 0
    assert len(read_parts) == (0 if length else 3)


@pytest.mark.parametrize("length", ["abc", "-1", "1.5", "", "٣"])
def test_a_content_length_that_is_not_a_number_is_refused(length: str) -> None:
    with pytest.raises(Refusal, match="Content-Length is"):
        read(Bodies(10, 100, 1.0), receiving(b""), length)


def test_a_body_that_does_not_arrive_times_out() -> None:
    bodies = Bodies(10, 100, 0.1)  # the client sends nothing for a minute
    with pytest.raises(Refusal, match="did not arrive") as caught:
        read(bodies, receiving(b"ab", ends=False), "9")
    assert caught.value.status == 408 and caught.value.close and bodies.bytes == 0


def test_a_body_that_drips_times_out() -> None:
    with pytest.raises(Refusal, match="did not arrive"):
        read(Bodies(100, 1000, 0.1), receiving(*[b"a"] * 50, delay=0.01))


def test_a_disconnected_client_leaves_no_accounted_bytes() -> None:
    bodies = Bodies(10, 100, 1.0)

    async def receive() -> dict[str, Any]:
        if bodies.bytes:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": b"abc", "more_body": True}

    with pytest.raises(Disconnected):
        read(bodies, receive)
    assert bodies.bytes == 0


def test_arriving_bodies_time_out_soon_when_the_server_drains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("aoft_deploy.serving.transport.bodies.DRAIN_SECONDS", 0.05)

    async def run() -> None:
        bodies = Bodies(10, 100, 60.0)
        half = asyncio.create_task(bodies.read(receiving(b"ab", ends=False), None))
        await asyncio.sleep(0.02)
        bodies.drain()
        for reading in (half, bodies.read(receiving(b"ab", ends=False), None)):
            with pytest.raises(Refusal, match="did not arrive"):
                await asyncio.wait_for(reading, 1)

    asyncio.run(run())
