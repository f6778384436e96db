"""Requests that offer another protocol are answered in HTTP/1.1 like all others."""

from __future__ import annotations

import asyncio
import http.client
import io
import itertools
import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from installed import program

from aoft_deploy.serving.endpoints.application import Application
from aoft_deploy.serving.service import Service
from aoft_deploy.serving.settings import Settings
from aoft_deploy.serving.transport.connections import connection_class

OFFERS = {
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n",
    "websocket": b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n",
    "TLS": b"upgrade: TLS/1.0, HTTP/2.0\r\nconnection: upgrade\r\n",
    "nothing": b"",
}
INNER = b"GET /inner HTTP/1.1\r\nHost: a\r\n\r\n"
PARSERS = ["httptools", "h11"]


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the path and the body that was received."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message["type"] == "http.request" and message["more_body"]
    content = scope["path"].encode() + b" " + body
    headers = [(b"content-length", b"%d" % len(content))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def talk(parser: str, parts: Sequence[bytes], application: Any = echo) -> list[tuple[int, bytes]]:
    """Status and content of a server's answers to some packets and the end of the stream."""

    async def run() -> bytes:
        make: Any = connection_class(parser, 100)
        config = uvicorn.Config(application, http=make, log_config=None, lifespan="off", ws="none")
        config.load()
        state = uvicorn.server.ServerState()
        server = await asyncio.get_running_loop().create_server(
            lambda: make(config=config, server_state=state, app_state={}), "127.0.0.1", 0
        )
        async with server, asyncio.timeout(20):
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            found = b""
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0)
            found = await reader.read()
            writer.close()
            while state.connections:
                await asyncio.sleep(0.001)
        return found

    return answers(asyncio.run(run()))


class Kept(io.BytesIO):
    """A stream from which several answers are read."""

    def makefile(self, mode: str) -> Kept:
        return self

    def close(self) -> None:
        pass


def answers(data: bytes) -> list[tuple[int, bytes]]:
    """The answers, parsed by Python's own client."""
    stream, found = Kept(data), []
    while stream.tell() < len(data):
        response = http.client.HTTPResponse(stream)  # type: ignore[arg-type]
        response.begin()
        found.append((response.status, response.read()))
    return found


def request(path: str, offer: bytes, body: bytes = b"", chunked: bool = False) -> bytes:
    head = b"POST %s HTTP/1.1\r\nHost: a\r\n%s" % (path.encode(), offer)
    if chunked:
        framed = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
        return head + b"Transfer-Encoding: chunked\r\n\r\n" + framed
    return head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)


LAST = b"GET /last HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("packets", ["one", "head and body", "bytes"])
def test_a_body_after_an_offer_is_never_read_as_a_request(
    parser: str, offer: str, chunked: bool, packets: str
) -> None:
    first = request("/first", OFFERS[offer], INNER, chunked)
    data = first + LAST
    edge = data.index(b"\r\n\r\n") + 4
    parts = {
        "one": [data],
        "head and body": [data[:edge], data[edge:]],
        "bytes": [data[i : i + 1] for i in range(len(data))],
    }[packets]
    assert talk(parser, parts) == [(200, b"/first " + INNER), (200, b"/last ")]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    requests=st.lists(
        st.tuples(st.sampled_from(list(OFFERS)), st.booleans(), st.sampled_from([0, 1, 300])),
        min_size=1,
        max_size=5,
    ),
    cuts=st.lists(st.integers(0, 10_000), max_size=6),
    parser=st.sampled_from(PARSERS),
)
def test_offers_change_no_answer_for_any_packet_boundaries(
    requests: list[tuple[str, bool, int]], cuts: list[int], parser: str
) -> None:
    data, wanted = b"", []
    for number, (offer, chunked, size) in enumerate(requests):
        body = (INNER * 10)[:size]
        data += request(f"/{number}", OFFERS[offer], body, chunked)
        wanted.append((200, b"/%d %s" % (number, body)))
    data += LAST
    edges = sorted({0, len(data), *(cut % len(data) for cut in cuts)})
    parts = [data[a:b] for a, b in itertools.pairwise(edges)]
    assert talk(parser, parts) == [*wanted, (200, b"/last ")]


@pytest.mark.parametrize("parser", PARSERS)
def test_a_large_body_after_an_offer_arrives_whole(parser: str) -> None:
    body = np.random.default_rng(0).bytes(700_000)
    first = request("/first", OFFERS["h2c"], body)
    assert talk(parser, [first, LAST]) == [(200, b"/first " + body), (200, b"/last ")]


@pytest.mark.parametrize("parser", PARSERS)
def test_hundreds_of_offers_in_one_packet_are_all_answered(parser: str) -> None:
    one = b"GET /a HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    assert len(talk(parser, [one * 900 + LAST])) == 901


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("target", ["example.org:443", "/v2/health/live", "http://a/v2"])
@pytest.mark.parametrize("body", [b"", b"Content-Length: 32\r\n"])
def test_connect_is_refused_and_nothing_after_it_is_read(
    parser: str, target: str, body: bytes, artefact: Path
) -> None:
    application = Application(Service(Settings(threads=1, follow=0), [("a", artefact)]))
    head = b"CONNECT %s HTTP/1.1\r\nHost: a\r\n%s\r\n" % (target.encode(), body)
    ((status, content),) = talk(parser, [head + INNER + LAST], application)
    assert status == 400 and list(json.loads(content)) == ["error"]


@pytest.mark.parametrize("parser", PARSERS)
def test_the_preface_of_http_2_is_refused(parser: str, artefact: Path) -> None:
    application = Application(Service(Settings(threads=1, follow=0), [("a", artefact)]))
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"
    ((status, content),) = talk(parser, [preface + INNER], application)
    assert status == 400 and list(json.loads(content)) == ["error"]


ENTRY = {"name": "pixel_values", "datatype": "FP32", "shape": [8, 3, 16, 16]}
IMAGES = np.random.default_rng(5).normal(size=ENTRY["shape"]).astype(np.float32)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=PARSERS)
def served(request: pytest.FixtureRequest, serve: Callable[..., Any], artefact: Path) -> Any:
    return serve(artefact, "--http", request.param)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A request of 130 kB, which arrives in several packets."""
    path = tmp_path_factory.mktemp("asked") / "request.json"
    path.write_text(json.dumps({"inputs": [{**ENTRY, "data": IMAGES.ravel().tolist()}]}))
    return path


def right(served: Any, content: str) -> bool:
    (output,) = json.loads(content)["outputs"]
    logits = np.array(output["data"], np.float32).reshape(output["shape"])
    return bool(np.array_equal(logits, served.logits("task", IMAGES)))


@pytest.mark.parametrize("how", ["length", "chunked", "expect"])
def test_the_java_client_is_answered(served: Any, asked: Path, how: str) -> None:
    java = program(["java"], ["openjdk-17-jdk-headless"])
    address = f"http://127.0.0.1:{served.port}/v2/models/task/infer"
    source = Path(__file__).parents[1] / "support" / "Post.java"
    command = [java, "-XX:TieredStopAtLevel=1", str(source), address, str(asked), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        version, status, content = line.split(" ", 2)
        assert (version, status) == ("HTTP_1_1", "200") and right(served, content)


@pytest.mark.parametrize("how", [[], ["-H", "Transfer-Encoding: chunked"], ["-H", "Expect:"]])
def test_curl_that_offers_http_2_is_answered(served: Any, asked: Path, how: list[str]) -> None:
    address = f"http://127.0.0.1:{served.port}/v2/models/task/infer"
    done = curl("--http2", *how, "--data-binary", f"@{asked}", address, address)
    assert done.returncode == 0, done.stderr
    first, second, rest = done.stdout.split(" 1.1 200\n")
    assert rest == "" and right(served, first) and right(served, second)


def test_curl_with_http_2_prior_knowledge_is_refused(served: Any) -> None:
    done = curl("--http2-prior-knowledge", f"http://127.0.0.1:{served.port}/v2/health/live")
    assert done.returncode in (
        16,
        52,
        56,
    )  # curl's codes: framing error, empty reply, receive error
    assert done.stdout == " 0 000\n"
    served.check()


def curl(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The output of curl, with version and status after each answer."""
    command = [program(["curl"], ["curl"]), "-sS", "--noproxy", "*", "--max-time", "60"]
    options = ["-w", " %{http_version} %{http_code}\n"]
    return subprocess.run([*command, *options, *arguments], capture_output=True, text=True)
