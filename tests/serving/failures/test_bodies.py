"""Bodies and heads that are too large, too slow, ambiguous or badly compressed."""

from __future__ import annotations

import gzip
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import numpy as np
import pytest
from failure_requests import (
    INFER,
    POST,
    body,
)
from faulty_model import send_raw

LENGTH = len(body())


def test_bad_compression_is_refused(served: Any) -> None:
    good = gzip.compress(body())
    for content in (b"garbage", good[:-5], b"", good + good):
        assert served.refused("POST", INFER, content, {"Content-Encoding": "gzip"})[0] == 400
    assert served.refused("POST", INFER, good, {"Content-Encoding": "br"})[0] == 415
    pack = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join(pack.compress(bytes(2**20)) for _ in range(512)) + pack.flush()
    start = time.monotonic()
    with served.within(16 * 2**20):
        assert served.refused("POST", INFER, bomb, {"Content-Encoding": "gzip"})[0] == 413
    assert time.monotonic() - start < 1


def test_a_body_that_is_too_large_is_refused(wire: Any) -> None:
    with wire.within(16 * 2**20):
        start = time.monotonic()
        response = send_raw(wire, [POST, b"Content-Length: 1000000000000\r\n\r\n{}"])
        assert b" 413 " in response.content and response.ended and time.monotonic() - start < 3
        piece = b"10000\r\n" + bytes(65536) + b"\r\n"
        response = send_raw(wire, [POST, b"Transfer-Encoding: chunked\r\n\r\n", *[piece] * 80])
        assert b" 413 " in response.content and response.ended
        assert wire.refused("POST", INFER, bytes(5 * 2**20))[0] == 413


def test_a_body_in_one_byte_chunks_is_read(wire: Any) -> None:
    head = POST + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    for content, status in ((b" " * 100_000, b" 400 "), (body().rjust(100_000), b" 200 ")):
        chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in content) + b"0\r\n\r\n"
        with wire.within(16 * 2**20):
            response = send_raw(wire, [head, chunks], seconds=20)
        assert status in response.content and response.ended


GOOD = body()

LENGTH_LINE = b"Content-Length: %d\r\n" % LENGTH

CHUNKED = b"Transfer-Encoding: chunked\r\n"

CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (LENGTH, GOOD)

SMUGGLED = {
    "length and chunks": LENGTH_LINE + CHUNKED + b"\r\n" + CHUNKS,
    "chunks and length": CHUNKED + LENGTH_LINE + b"\r\n" + CHUNKS,
    "length, not in chunks": LENGTH_LINE + CHUNKED + b"\r\n" + GOOD,
    "a shorter length": b"Content-Length: 4\r\n" + CHUNKED + b"\r\n" + CHUNKS,
    "chunks in a folded line": LENGTH_LINE + b"Transfer-Encoding:\r\n chunked\r\n\r\n" + CHUNKS,
    "two lengths": LENGTH_LINE + b"Content-Length: 5\r\n\r\n" + GOOD,
    "two lengths, the good one last": b"Content-Length: 5\r\n" + LENGTH_LINE + b"\r\n" + GOOD,
    "two lengths in one": LENGTH_LINE[:-2] + b", 5\r\n\r\n" + GOOD,
    "length with a sign": b"Content-Length: +%d\r\n\r\n" % LENGTH + GOOD,
    "length in words": b"Content-Length: %d abc\r\n\r\n" % LENGTH + GOOD,
    "no number": b"Content-Length: abc\r\n\r\n" + GOOD,
    "space before the colon": LENGTH_LINE.replace(b":", b" :") + b"\r\n" + GOOD,
    "another encoding": LENGTH_LINE + b"Transfer-Encoding: xchunked\r\n\r\n" + GOOD,
    "two encodings": CHUNKED + b"Transfer-Encoding: identity\r\n\r\n" + CHUNKS,
    "no size of a chunk": CHUNKED + b"\r\nzz\r\n" + CHUNKS,
    "letters after a chunk's size": CHUNKED + b"\r\n" + CHUNKS.replace(b"\r", b"g\r", 1),
    "0x before a chunk's size": CHUNKED + b"\r\n0x" + CHUNKS,
    "a negative size": CHUNKED + b"\r\n-" + CHUNKS,
    "a size beyond 64 bits": CHUNKED + b"\r\n1" + b"%020x" % LENGTH + CHUNKS[3:],
    "a chunk longer than its size": CHUNKED + b"\r\n" + CHUNKS.replace(b"}\r\n", b"}XX"),
    "NUL in a line": b"X-A: \0\r\n" + LENGTH_LINE + b"\r\n" + GOOD,
    "a line of NUL": b"\0\r\n" + LENGTH_LINE + b"\r\n" + GOOD,
    "a bare CR": b"X-A: b\r" + CHUNKED + LENGTH_LINE + b"\r\n" + GOOD,
    "300 headers": b"A: b\r\n" * 300 + LENGTH_LINE + b"\r\n" + GOOD,
}


@pytest.mark.parametrize("name", SMUGGLED)
def test_ambiguous_requests_are_refused_and_nothing_after_them_is_read(
    wire: Any, name: str
) -> None:
    behind = b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n"
    response = send_raw(wire, [POST + SMUGGLED[name] + behind])
    assert response.ended
    assert response.content == b"" or response.content.startswith(
        (b"HTTP/1.1 400", b"HTTP/1.1 431")
    )
    assert response.content.count(b"HTTP/1.1") <= 1


def test_the_parts_of_ambiguous_requests_are_valid_by_themselves(wire: Any) -> None:
    for content in (LENGTH_LINE + b"\r\n" + GOOD, CHUNKED + b"\r\n" + CHUNKS):
        response = send_raw(wire, [POST + b"Connection: close\r\n" + content])
        assert response.content.startswith(b"HTTP/1.1 200") and response.ended


A_LINE = (b"a" * 65536, 4800)

ENDLESS = {
    "a header": (b"GET /v2 HTTP/1.1\r\nHost: a\r\nA: ", *A_LINE),
    "a header's name": (b"GET /v2 HTTP/1.1\r\nHost: a\r\n", *A_LINE),
    "200,000 headers": (b"GET /v2 HTTP/1.1\r\nHost: a\r\n", b"A: b\r\n" * 1000, 200),
    "an address": (b"GET /v2/", *A_LINE),
    "a trailer": (POST + CHUNKED + b"\r\n" + CHUNKS[:-2] + b"A: ", *A_LINE),
    "200,000 trailers": (POST + CHUNKED + b"\r\n" + CHUNKS[:-2], b"A: b\r\n" * 1000, 200),
    "a chunk's extension": (POST + CHUNKED + b"\r\n1;", *A_LINE),
}
"""The start of a request, what follows, and how many times: up to 300 MB."""


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_headers_are_refused_and_do_not_delay_others(wire: Any, name: str) -> None:
    head, piece, count = ENDLESS[name]
    with wire.within(8 * 2**20), answering(wire) as seconds:
        response = send_raw(wire, [head, *repeat(piece, count), b"\r\n\r\n"])
    assert response.ended and response.sent < 5 * 2**20
    assert response.content == b"" or response.content.startswith(b"HTTP/1.1 4")
    assert max(seconds) < 0.5


@contextmanager
def answering(server: Any) -> Iterator[list[float]]:
    """Context manager: seconds that health checks take meanwhile."""
    seconds, ended = list[float](), threading.Event()

    def ask() -> None:
        while not seconds or not ended.is_set():
            start = time.monotonic()
            assert server.ask("GET", "/v2/health/ready")[0] == 200
            seconds.append(time.monotonic() - start)

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask)
        try:
            yield seconds
        finally:
            ended.set()
            asked.result()


def test_slow_clients_time_out_and_do_not_delay_others(wire: Any) -> None:
    head = POST + b"Content-Length: 9\r\n\r\n{}"
    slow = []
    for _ in range(300):
        slow.append(socket.create_connection(("127.0.0.1", wire.port), timeout=10))
        slow[-1].sendall(head)
    start = time.monotonic()
    images, logits = wire.expected["task"]
    assert np.array_equal(wire.logits("task", images), logits)
    assert time.monotonic() - start < 0.5
    for connection in slow:
        found = b""
        while piece := connection.recv(4096):
            found += piece
        assert b" 408 " in found and b"did not arrive" in found
        connection.close()
    assert time.monotonic() - start < 8
