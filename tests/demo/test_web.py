"""What the server adds to Gradio's."""

from __future__ import annotations

import asyncio

import httpx
from starlette.responses import PlainTextResponse

from aoft_demo.web import Additions


def get(server: Additions, method: str, path: str) -> httpx.Response:
    """The answer to one request."""

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(server)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path)

    return asyncio.run(ask())


def test_each_example_has_its_own_address() -> None:
    server = Additions(PlainTextResponse("gradio"), [b"one", b"two"])
    first, second = (get(server, "GET", f"/aoft/example/{number}") for number in (0, 1))
    assert (first.content, second.content) == (b"one", b"two")
    assert first.headers["content-type"] == "image/jpeg"
    assert first.headers["x-content-type-options"] == "nosniff"
    for path in ("/aoft/example/2", "/aoft/example/", "/aoft/example/-1", "/aoft/nothing"):
        assert get(server, "GET", path).status_code == 404
    assert get(server, "POST", "/aoft/example/0").status_code == 405
    assert get(server, "GET", "/elsewhere").text == "gradio"


def test_a_page_notices_another_server() -> None:
    one, other = (Additions(PlainTextResponse(""), []) for _ in range(2))
    alive = [get(server, "GET", "/aoft/alive") for server in (one, one, other)]
    starts = [answer.json()["start"] for answer in alive]
    assert starts[0] == starts[1] != starts[2]
    assert alive[0].headers["cache-control"] == "no-store"


def test_the_page_is_compressed_and_streams_are_not() -> None:
    page, stream = (
        get(Additions(PlainTextResponse("a" * 10_000), []), "GET", path)
        for path in ("/", "/gradio_api/queue/data")
    )
    assert page.headers["content-encoding"] == "gzip" and page.text == stream.text
    assert "content-encoding" not in stream.headers
