"""Everything that goes wrong with a server, and what must come of it; it serves on after each.

The rows of the survey of failures, by number, and where each is tested:

    1-11        here (through a socket), and in test_serving_protocol.py
    12, 13      here, and in test_serving_parts.py
    14-16, 18   here
    17          here, and in test_serving_connections.py: headers that do not come
    19-23, 26   here
    24, 25, 27  here, and in test_serving_batcher.py; 24 also in test_serving_application.py
    28, 29      test_serving_server.py
    30          here, and in test_serving_application.py: a runtime that cannot be stopped
    31, 32      here
    33          here, and in ``Served.refused`` of conftest.py for whatever a server refuses
    34-37       here, in test_serving_parts.py and, of the decoder alone, in test_images.py
    38, 39      test_published.py, test_bad_input.py, test_task_store.py, test_sources.py
    40          here, in test_bad_input.py and in test_task_store.py
    41          here, in test_serving_parts.py and in test_single_file.py
    42          here, when a server starts and when it loads
    43          test_published.py: of a backbone's .npz single arrays are read, nothing is unpacked
                to the disk, and no other archive is opened; test_serving_parts.py: settings, TOML
    44          test_output_safety.py, test_files.py, test_bad_input.py
    45          test_tensorrt.py
    46          test_demo_safety.py, test_demo_browser.py

Where they deviate from it:

    31          400 TB are asked for, since some machines have its 40 GB.
    34          What is no picture of a known kind (random bytes, HTML, SVG, PDF) gets 415, as HTTP
                has it; a damaged one gets the survey's 400.
    38-40, 42   A command that refuses a file ends with 1, not with 2, which says wrong usage.
"""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
from bombs import BESIDE, LARGE, png
from faulty_model import (
    expected_logits,
    faulty_images,
    metadata_of,
    plain_images,
    send_raw,
    without_digest,
    write_faulty_model,
)
from PIL import Image
from safetensors.numpy import load_file, save_file

from aoft_deploy.artefacts.prediction import load_classifier

TOKEN = "a token of more than sixteen bytes"
ADMIN = {"Authorization": f"Bearer {TOKEN}"}
INFER = "/v2/models/task/infer"
CLASSIFY = "/v2/models/task/classify"
POST = b"POST /v2/models/task/infer HTTP/1.1\r\nHost: a\r\n"
ROOM = 20 * 2**20
"""Bytes by which a server may have grown after any of the tests.

Nine MiB are the most that was seen: pieces of a MiB in which some object of Python's still lies.
"""


@pytest.fixture(scope="module")
def made_artefact(artefact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faulty_model(tmp_path_factory.mktemp("made") / "made.onnx", metadata_of(artefact))


@pytest.fixture(scope="module")
def repository(
    artefact: Path, fleet_tasks: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("outer") / "repository"
    folder.mkdir()
    shutil.copy(artefact, folder / "changing.onnx")
    shutil.copy(fleet_tasks["zürich"], folder / "zürich.ckpt")
    shutil.copy(artefact, folder.parent / "outside.onnx")
    return folder


IMAGES = np.random.default_rng(3).normal(size=(2, 3, 16, 16)).astype(np.float32)
HARMLESS = plain_images(4, 2)


def known(server: Any, **models: Any) -> Any:
    """A warm server, with what it answers at first and what memory it takes."""
    server.expected = {name: (each, server.logits(name, each)) for name, each in models.items()}
    for _ in range(50):
        server.logits("task", IMAGES)
    server.baseline = server.memory()
    return server


@pytest.fixture(scope="module")
def served(
    serve: Callable[..., Any],
    artefact: Path,
    made_artefact: Path,
    fleet_artefact: Path,
    repository: Path,
) -> Any:
    token = repository.parent / "token"
    token.write_text(TOKEN)
    options = ["--admin-token-file", token, "--repository", repository, "--follow", "0"]
    options += ["--queue", 64, "--body-timeout", 2, "--max-body", 4 * 2**20]
    options += ["--max-pixels", 10**7, "--engine-timeout", 3]
    server = serve(f"task={artefact}", made_artefact, fleet_artefact, *options)
    assert np.allclose(server.logits("made", HARMLESS), expected_logits(HARMLESS), atol=1e-4)
    return known(server, task=IMAGES, made=HARMLESS)


@pytest.fixture(scope="module", params=["httptools", "h11"])
def wire(request: pytest.FixtureRequest, serve: Callable[..., Any], artefact: Path) -> Any:
    """A server on each HTTP parser, without a token."""
    options = ["--http", request.param, "--body-timeout", 5, "--max-body", 4 * 2**20]
    return known(serve(f"task={artefact}", *options), task=IMAGES)


@pytest.fixture(autouse=True)
def alive_ready_and_right(request: pytest.FixtureRequest, served: Any) -> Iterator[None]:
    servers = [served]
    if "wire" in request.fixturenames:
        servers.append(request.getfixturevalue("wire"))
    yield
    for server in servers:
        server.check()
        for model, (images, logits) in server.expected.items():
            assert np.array_equal(server.logits(model, images), logits)
        assert server.memory() < server.baseline + ROOM


def entry(**changes: Any) -> dict[str, Any]:
    base = {
        "name": "pixel_values",
        "datatype": "FP32",
        "shape": [1, 3, 16, 16],
        "data": [0.5] * 768,
    }
    return {**base, **changes}


def body(*inputs: Any, **rest: Any) -> bytes:
    return json.dumps({"inputs": list(inputs) or [entry()], **rest}).encode()


BAD_REQUESTS: dict[str, tuple[bytes, int]] = {
    "1 empty": (b"", 400),
    "1 cut": (b"{oops", 400),
    "1 list": (b"[]", 400),
    "1 null": (b"null", 400),
    "1 bad UTF-8": (b'{"inputs": "\xff"}', 400),
    "1 inputs an object": (b'{"inputs": {}}', 400),
    "1 inputs numbers": (b'{"inputs": [1, 2]}', 400),
    "2 missing": (b'{"inputs": []}', 400),
    "2 unknown": (body(entry(name="y")), 400),
    "2 twice": (body(entry(), entry()), 400),
    "3 type": (body(entry(datatype="FLOATY")), 400),
    "3 another type": (body(entry(datatype="FP64")), 400),
    "3 rank": (body(entry(shape=[768])), 400),
    "3 zero": (body(entry(shape=[0, 3, 16, 16], data=[])), 400),
    "3 minus": (body(entry(shape=[-1, 3, 16, 16])), 400),
    "3 fraction": (body(entry(shape=[1.5, 3, 16, 16])), 400),
    "3 text": (body(entry(shape=["1", 3, 16, 16])), 400),
    "3 true": (body(entry(shape=[True, 3, 16, 16])), 400),
    "4 overflow": (body(entry(shape=[2**62, 2**62, 16, 16])), 400),
    "5 expansion": (body(entry(shape=[10**9, 3, 16, 16], data=[1])), 400),
    "6 few": (body(entry(data=[1.0])), 400),
    "6 many": (body(entry(data=[1.0] * 769)), 400),
    "6 ragged": (body(entry(data=[[[[1.0] * 16] * 15 + [[1.0]]] * 3])), 400),
    "6 strings": (body(entry(data=["1"] * 768)), 400),
    "6 null": (body(entry(data=[None] * 768)), 400),
    "6 NaN": (body(entry(data=[float("nan")] * 768)), 400),
    "6 1e400": (body().replace(b"0.5", b"1e400", 1), 400),
    "7 depth": (b'{"inputs":' + b"[" * 250_000, 400),
    "8 long id": (body(id="x" * 2**20), 400),
    "8 number as id": (body(id=7), 400),
    "8 digits": (body().replace(b"0.5", b"1" * 10_000, 1), 400),
    "9 unknown output": (body(outputs=[{"name": "y"}]), 400),
    "9 twice": (body(outputs=[{"name": "logits"}] * 2), 400),
    "9 100,000": (body(outputs=[{"name": "logits"}] * 100_000), 400),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request(served: Any, name: str) -> None:
    content, status = BAD_REQUESTS[name]
    with served.within((8 if name.startswith("5") else 48) * 2**20):
        assert served.refused("POST", INFER, content)[0] == status


def test_7_depth_in_the_repository_index(served: Any) -> None:
    for content in (b'{"a":' * 250_000, b"[" * 60_000, b"{"):
        assert served.refused("POST", "/v2/repository/index", content)[0] in (400, 413)


LENGTH = len(body())


@pytest.mark.parametrize(
    "length",
    ["-1", "99999999999", "abc", "1" * 1000, str(LENGTH + 1), str(LENGTH - 1), "+9", "9.0"],
)
def test_10_a_bad_length_of_the_json(served: Any, length: str) -> None:
    headers = {"Inference-Header-Content-Length": length}
    assert served.refused("POST", INFER, body(), headers)[0] == 400
    headers = {"Inference-Header-Content-Length": str(LENGTH)}
    assert served.ask("POST", INFER, body(), headers)[0] == 200


def binary(
    size: int, tail: int, shape: Sequence[int] = (1, 3, 16, 16), **rest: Any
) -> tuple[bytes, dict[str, str]]:
    """A request that says ``size`` bytes follow its JSON, where ``tail`` do."""
    image = entry(parameters={"binary_data_size": size}, shape=shape)
    del image["data"]
    text = json.dumps({"inputs": [image], **rest}).encode()
    return text + bytes(tail), {"Inference-Header-Content-Length": str(len(text))}


@pytest.mark.parametrize("size", [10**12, -4, 3071, 3072, 3073])
def test_11_a_bad_size_of_the_binary_part(served: Any, size: int) -> None:
    for tail in (3072, 3071, 3073, 0):
        if (size, tail) == (3072, 3072):
            assert served.ask("POST", INFER, *binary(size, tail))[0] == 200
        else:
            assert served.refused("POST", INFER, *binary(size, tail))[0] == 400


def test_5_and_11_a_large_shape_of_few_bytes_takes_no_memory(served: Any) -> None:
    with served.within(8 * 2**20):
        for size, tail in ((4, 4), (10**9 * 3072, 4), (10**9 * 3072, 3072)):
            request = binary(size, tail, shape=[10**9, 3, 16, 16])
            assert served.refused("POST", INFER, *request)[0] == 400


def test_12_bad_compression(served: Any) -> None:
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


def test_13_a_body_that_is_too_large(wire: Any) -> None:
    with wire.within(16 * 2**20):
        start = time.monotonic()
        heard = send_raw(wire, [POST, b"Content-Length: 1000000000000\r\n\r\n{}"])
        assert b" 413 " in heard.content and heard.ended and time.monotonic() - start < 3
        piece = b"10000\r\n" + bytes(65536) + b"\r\n"
        heard = send_raw(wire, [POST, b"Transfer-Encoding: chunked\r\n\r\n", *[piece] * 80])
        assert b" 413 " in heard.content and heard.ended
        assert wire.refused("POST", INFER, bytes(5 * 2**20))[0] == 413


def test_14_many_chunks(wire: Any) -> None:
    head = POST + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    for content, status in ((b" " * 100_000, b" 400 "), (body().rjust(100_000), b" 200 ")):
        chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in content) + b"0\r\n\r\n"
        with wire.within(16 * 2**20):
            heard = send_raw(wire, [head, chunks], seconds=20)
        assert status in heard.content and heard.ended


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
def test_15_ambiguous_requests(wire: Any, name: str) -> None:
    behind = b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n"
    heard = send_raw(wire, [POST + SMUGGLED[name] + behind])
    assert heard.ended
    assert heard.content == b"" or heard.content.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))
    assert heard.content.count(b"HTTP/1.1") <= 1


def test_15_what_they_are_made_of_is_good(wire: Any) -> None:
    for content in (LENGTH_LINE + b"\r\n" + GOOD, CHUNKED + b"\r\n" + CHUNKS):
        heard = send_raw(wire, [POST + b"Connection: close\r\n" + content])
        assert heard.content.startswith(b"HTTP/1.1 200") and heard.ended


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
"""What the head of a request begins with, and what then comes how often: up to 300 MB."""


@pytest.mark.parametrize("name", ENDLESS)
def test_16_endless_headers(wire: Any, name: str) -> None:
    head, piece, count = ENDLESS[name]
    with wire.within(8 * 2**20), answering(wire) as seconds:
        heard = send_raw(wire, [head, *repeat(piece, count), b"\r\n\r\n"])
    assert heard.ended and heard.sent < 5 * 2**20
    assert heard.content == b"" or heard.content.startswith(b"HTTP/1.1 4")
    assert max(seconds) < 0.5


@contextmanager
def answering(server: Any) -> Iterator[list[float]]:
    """Seconds that others wait meanwhile for the server to say that it is ready."""
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


def test_17_slow_clients(wire: Any) -> None:
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


NAMES = [
    "nobody",
    "..%2f..%2fetc",
    "%2e%2e",
    "a%00b",
    "x" * 10_000,
    "task%2f..",
    "task/..",
    "%20..",
    "%20",
    "task%20",
    "Task",
    "%ff%fe",
]


@pytest.mark.parametrize("name", NAMES)
def test_18_models_that_are_not_there(served: Any, name: str) -> None:
    for method, suffix in (
        ("POST", "/infer"),
        ("POST", "/classify"),
        ("GET", ""),
        ("GET", "/config"),
    ):
        status, _ = served.refused(method, f"/v2/models/{name}{suffix}", b"")
        assert status in (400, 404)
    for change in ("load", "unload"):
        status, _ = served.refused("POST", f"/v2/repository/models/{name}/{change}", b"", ADMIN)
        assert status in (400, 404)


def test_19_versions_and_methods(served: Any) -> None:
    for version in ("99", "abc", "0", "-1", "1.0"):
        address = f"/v2/models/task/versions/{version}"
        assert served.refused("POST", address + "/infer", body())[0] == 404
        assert served.refused("GET", address)[0] == 404
    for method in ("GET", "PUT", "DELETE", "PATCH"):
        assert served.refused(method, INFER)[0] == 405
    assert served.refused("POST", "/v2")[0] == 405
    assert served.refused("GET", "/")[0] == 404
    assert served.ask("POST", "/v2/models/task/versions/1/infer", body())[0] == 200


def changed(server: Any, name: str, change: str = "load", content: Any = b"{}") -> tuple[int, str]:
    """Status and sentence of a change of the repository that the token allows."""
    address = f"/v2/repository/models/{name}/{change}"
    answer = server.ask("POST", address, content, ADMIN)
    return (200, "") if answer[0] == 200 else server.sentence(*answer)


@pytest.mark.parametrize("change", ["load", "unload"])
def test_20_the_repository_is_changed_with_the_token_only(served: Any, change: str) -> None:
    address = f"/v2/repository/models/task/{change}"
    for token in (None, "", "Bearer", "Bearer ", f"Bearer {TOKEN}x", TOKEN, "Bearer \xff"):
        headers = {} if token is None else {"Authorization": token}
        assert served.refused("POST", address, b"{}", headers)[0] == 403


@pytest.mark.parametrize("change", ["load", "unload"])
def test_20_without_a_token_the_repository_is_not_changed_at_all(wire: Any, change: str) -> None:
    address = f"/v2/repository/models/task/{change}"
    for token in (None, "", "Bearer", "Bearer ", "Bearer None", f"Bearer {TOKEN}"):
        headers = {} if token is None else {"Authorization": token}
        status, message = wire.refused("POST", address, b"{}", headers)
        assert (status, message) == (403, "The repository cannot be changed over HTTP.")


@pytest.fixture(scope="module")
def canary() -> Iterator[socket.socket]:
    """A server that nobody should connect to."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        yield listening


@pytest.mark.parametrize(
    "parameters",
    [
        {"config": "{}"},
        {"file:../../x": "aGk="},
        {"file:1/model.onnx": "aGk="},
        {"source": "http://CANARY/x.onnx"},
        {"url": "http://CANARY/x.onnx"},
        [],
        "http://CANARY/x.onnx",
        1,
    ],
)
def test_21_nothing_is_loaded_that_the_client_sends(
    served: Any, repository: Path, canary: socket.socket, parameters: Any
) -> None:
    before = sorted(repository.parent.rglob("*"))
    host = f"127.0.0.1:{canary.getsockname()[1]}"
    content = json.dumps({"parameters": parameters}).replace("CANARY", host)
    if parameters == []:  # as good as none
        assert changed(served, "task", content=content)[0] == 200
    else:
        assert changed(served, "task", content=content)[0] == 400
    link = f"http:%2F%2F{host}%2Fx.onnx"
    for name in ("outside", "..%2Foutside", "x" * 256, link, f"file:%2F%2F{host}%2Fx.onnx"):
        assert changed(served, name)[0] in (400, 404)
    picture = f'<svg><image href="http://{host}/a.png"/></svg>'.encode()
    assert served.refused("POST", "/v2/models/task/classify", picture)[0] == 415
    assert served.refused("POST", INFER, body(entry(data=f"http://{host}/a")))[0] == 400
    assert sorted(repository.parent.rglob("*")) == before
    with pytest.raises(BlockingIOError):
        canary.accept()


def test_22_loading_and_unloading_beside_requests(served: Any) -> None:
    end, found = time.monotonic() + 1.5, list[tuple[str, int]]()

    def change(name: str, kind: str) -> None:
        while time.monotonic() < end:
            address = f"/v2/repository/models/{name}/{kind}"
            found.append((kind, served.ask("POST", address, b"{}", ADMIN)[0]))

    def request(name: str) -> None:
        content = body()
        while time.monotonic() < end:
            found.append(("infer", served.ask("POST", f"/v2/models/{name}/infer", content)[0]))

    work: list[tuple[Any, ...]] = [
        (target, name, *kind)
        for name in ("zürich", "changing")
        for target, *kind in ((change, "load"), (change, "unload"), (request,))
    ]
    quoted = {"zürich": "z%C3%BCrich", "changing": "changing"}
    with ThreadPoolExecutor(len(work)) as pool:
        for task in [pool.submit(f, quoted[name], *rest) for f, name, *rest in work]:
            task.result()
    assert {status for _, status in found} == {200, 404}
    assert {kind for kind, status in found if status == 200} == {"load", "unload", "infer"}
    for name in quoted.values():
        assert served.ask("POST", f"/v2/repository/models/{name}/load", b"{}", ADMIN)[0] == 200


GRAPHS = ("cyclic", "opset", "unknown operator", "truncated", "random", "outside", "no model")


def damaged(artefact: Path, path: Path, fault: str) -> None:
    """Write a copy of an artefact with a fault."""
    proto = onnx.load(artefact)
    if fault == "cyclic":
        proto.graph.node[0].input[0] = proto.graph.node[-2].output[0]
    elif fault == "outside":
        onnx.external_data_helper.set_external_data(proto.graph.initializer[0], "../secret")
        proto.graph.initializer[0].ClearField("raw_data")
    elif fault == "opset":
        proto.opset_import[0].version = 999
    elif fault == "unknown operator":
        proto.graph.node[0].op_type = "Nonsense"
    elif fault == "no model":
        del proto.metadata_props[:]
    content = without_digest(proto)
    if fault == "truncated":
        content = content[: len(content) // 2]
    elif fault == "random":
        content = os.urandom(5000)
    path.write_bytes(content)


def reason(served: Any, name: str) -> str:
    """Why a model that is ready could not be exchanged, as the index tells."""
    index = json.loads(served.ask("POST", "/v2/repository/index")[2])
    (told,) = (entry for entry in index if entry["name"] == name)
    assert told["state"] == "READY"
    return str(told["reason"])


@pytest.mark.parametrize("fault", GRAPHS)
def test_23_and_42_a_bad_artefact_does_not_take_a_good_one_s_place(
    served: Any, repository: Path, artefact: Path, fault: str
) -> None:
    path = repository / "changing.onnx"
    damaged(artefact, path, fault)
    try:
        before = served.logits("changing", IMAGES)
        status, message = changed(served, "changing")
        assert status == 400 and message.startswith("changing was not loaded: changing.onnx ")
        told = reason(served, "changing")
        assert message.endswith(told) and str(repository) not in told
        assert np.array_equal(served.logits("changing", IMAGES), before)
    finally:
        shutil.copy(artefact, path)
    assert changed(served, "changing")[0] == 200 and reason(served, "changing") == ""


@pytest.mark.parametrize("fault", GRAPHS)
def test_42_a_server_that_is_given_a_bad_artefact_says_so_and_ends(
    artefact: Path, tmp_path: Path, fault: str
) -> None:
    damaged(artefact, tmp_path / "bad.onnx", fault)
    command = [sys.executable, "-m", "aoft_deploy.cli.serve", "bad.onnx", "--port", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    *told, sentence = done.stderr.splitlines()
    assert done.returncode == 1 and sentence.startswith("error: bad.onnx ")
    events = [json.loads(line)["event"] for line in told]
    assert "ready" not in events and not any("Traceback" in line for line in told)


def faulty_checkpoint(good: Path, path: Path, fault: str, other: Path) -> None:
    """Write a copy of a checkpoint with a fault."""
    tensors = load_file(good)
    with good.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        text = json.loads(file.read(length))["__metadata__"]["aoft"]
    name = next(iter(tensors))
    if fault == "deep":
        text = "[" * 100_000
    elif fault == "no JSON":
        text = "{"
    elif fault == "no object":
        text = "[]"
    elif fault == "NaN":
        tensors[name] = np.full_like(tensors[name], np.nan)
    elif fault == "infinite":
        tensors[name] = np.full_like(tensors[name], np.inf)
    elif fault == "shape":
        tensors[name] = np.zeros((1, *tensors[name].shape), np.float32)
    elif fault == "no head":
        tensors = {name: t for name, t in tensors.items() if not name.startswith("head.")}
    elif fault == "another backbone":
        described = json.loads(text)
        described["backbone"]["digest"] = "0" * 64
        text = json.dumps(described)
    save_file(tensors, path, {"aoft": text})
    if fault == "pickle":
        path.write_bytes(b"\x80\x04junk")
    elif fault == "truncated":
        path.write_bytes(good.read_bytes()[:-9])
    elif fault == "another method":
        shutil.copy(other, path)


CHECKPOINTS = ["pickle", "truncated", "deep", "no JSON", "no object", "NaN", "infinite", "shape"]
CHECKPOINTS += ["no head", "another backbone", "another method"]


@pytest.mark.parametrize("fault", CHECKPOINTS)
def test_23_and_40_a_bad_checkpoint_does_not_take_a_task_s_place(
    served: Any, repository: Path, fleet_tasks: dict[str, Path], checkpoint: Path, fault: str
) -> None:
    path, name = repository / "zürich.ckpt", "z%C3%BCrich"
    before = served.logits(name, IMAGES)
    faulty_checkpoint(fleet_tasks["zürich"], path, fault, checkpoint)
    try:
        status, message = changed(served, name)
        assert status == 400 and message.startswith("zürich was not loaded: ")
        told = reason(served, "zürich")
        assert message.endswith(told) and "zürich.ckpt" in told and str(repository) not in told
        assert np.array_equal(served.logits(name, IMAGES), before)
    finally:
        shutil.copy(fleet_tasks["zürich"], path)
    assert changed(served, name)[0] == 200 and reason(served, "zürich") == ""


def test_23_whatever_a_file_makes_its_reader_raise_is_told(
    served: Any, repository: Path, fleet_artefact: Path
) -> None:
    proto = onnx.load(fleet_artefact)
    for told in proto.metadata_props:
        if told.key == "preprocessing":
            told.value = "3"
    path = repository / "strange.onnx"
    path.write_bytes(without_digest(proto))
    status, message = changed(served, "strange")
    path.unlink()
    assert status == 400 and message.startswith("strange was not loaded: strange.onnx ")
    assert served.refused("GET", "/v2/models/strange")[0] == 404


def test_23_a_pipe_in_the_repository_is_passed_over(served: Any, repository: Path) -> None:
    for name in ("pipe.ckpt", "pipe.onnx"):
        os.mkfifo(repository / name)
    (repository / "nowhere.onnx").symlink_to("none")
    try:
        assert changed(served, "pipe")[0] == changed(served, "nowhere")[0] == 404
    finally:
        for name in ("pipe.ckpt", "pipe.onnx", "nowhere.onnx"):
            (repository / name).unlink()


def test_23_a_good_checkpoint_takes_a_task_s_place(
    served: Any, repository: Path, fleet_tasks: dict[str, Path]
) -> None:
    path, name = repository / "zürich.ckpt", "z%C3%BCrich"
    shutil.copy(fleet_tasks["pets"], path)
    try:
        assert changed(served, name)[0] == 200
        wanted = served.logits("pets", IMAGES)
        assert np.allclose(served.logits(name, IMAGES), wanted, atol=1e-5)
    finally:
        shutil.copy(fleet_tasks["zürich"], path)
    assert changed(served, name)[0] == 200


@pytest.fixture(scope="module")
def second(served: Any) -> float:
    """Millions of turns that take the made artefact about a second."""

    def measured() -> float:
        start = time.monotonic()
        served.logits("made", faulty_images(turns=0.05))
        return time.monotonic() - start

    return 0.05 / min(measured() for _ in range(4))


@contextmanager
def busy(served: Any, turns: float) -> Iterator[threading.Thread]:
    """While the made artefact runs for so many millions of turns."""
    blocker = threading.Thread(target=served.logits, args=("made", faulty_images(turns=turns)))
    blocker.start()
    time.sleep(0.2)
    try:
        yield blocker
    finally:
        blocker.join()


class Reply(NamedTuple):
    """What came of a request: when its status came, after how many seconds, and what it says."""

    status: int
    moment: float
    seconds: float
    headers: dict[str, str]
    content: bytes

    def right(self, image: Any) -> bool:
        """Whether it holds the made artefact's logits of an image."""
        data = json.loads(self.content)["outputs"][0]["data"]
        return np.allclose(data, expected_logits(image), atol=1e-4)


def at_once(served: Any, requests: Iterable[tuple[Any, dict[str, Any]]]) -> list[Reply]:
    """What comes of requests to the made artefact that one thread sends at once.

    Each has a connection of its own, which is there before.
    """

    def written(image: Any, rest: dict[str, Any]) -> bytes:
        asked, _ = binary(image.nbytes, 0, **rest)
        size = len(asked) + image.nbytes
        head = f"POST /v2/models/made/infer HTTP/1.1\r\nHost: a\r\nContent-Length: {size}\r\n"
        head += f"Inference-Header-Content-Length: {len(asked)}\r\n\r\n"
        tail: bytes = image.tobytes()
        return head.encode() + asked + tail

    async def one(streams: Any, content: bytes) -> Reply:
        reader, writer = streams
        start = time.monotonic()
        writer.write(content)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
        moment = time.monotonic()
        headers = {n.lower(): v for n, v in (line.split(": ", 1) for line in lines[1:])}
        answer = await reader.readexactly(int(headers["content-length"]))
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
        return Reply(int(lines[0].split()[1]), moment, moment - start, headers, answer)

    async def all_of_them() -> list[Reply]:
        asked = [written(*request) for request in requests]
        opened = [await asyncio.open_connection("127.0.0.1", served.port) for _ in asked]
        return await asyncio.gather(*map(one, opened, asked))

    return asyncio.run(all_of_them())


def test_24_overload(served: Any, second: float) -> None:
    images = [plain_images(i) for i in range(200)]
    with busy(served, second):
        found = at_once(served, [(image, {}) for image in images])
    taken = [reply for reply in found if reply.status == 200]
    refused = [reply for reply in found if reply.status == 429]
    assert len(taken) + len(refused) == 200 and len(taken) >= 64
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
    assert all(r.right(image) for r, image in zip(found, images, strict=True) if r in taken)


def test_25_time_runs_out_in_the_queue(served: Any, second: float) -> None:
    before = executed(served)
    with busy(served, second) as blocker:
        (reply,) = at_once(served, [(faulty_images(), {"parameters": {"timeout": 1000}})])
        assert reply.status == 504 and blocker.is_alive()
    served.logits("made", faulty_images())
    assert executed(served) - before == 2


def executed(served: Any) -> int:
    content = served.ask("GET", "/v2/models/made/stats")[2]
    return int(json.loads(content)["model_stats"][0]["inference_count"])


def counted(served: Any, model: str, status: int) -> float:
    text = served.ask("GET", "/metrics")[2].decode()
    start = f'aoft_requests_total{{model="{model}",status="{status}"}} '
    return sum(float(line.removeprefix(start)) for line in text.splitlines() if start in line)


def test_26_clients_that_go_away(served: Any, second: float) -> None:
    before, done = counted(served, "made", 499), executed(served)
    content = body(entry(data=faulty_images().ravel().tolist()))
    head = b"POST /v2/models/made/infer HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"
    with busy(served, 1.4 * second) as blocker:
        for cut in (10, len(content)):
            for _ in range(20):
                with socket.create_connection(("127.0.0.1", served.port)) as connection:
                    now = struct.pack("ii", 1, 0)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
                    connection.sendall(head % len(content) + content[:cut])
                    time.sleep(0.01)
        while counted(served, "made", 499) - before < 40:
            assert blocker.is_alive()
            time.sleep(0.01)
        text = served.ask("GET", "/metrics")[2].decode()
        assert 'aoft_queue_depth{artefact="made"} 0' in text and "aoft_in_flight 2" in text
        assert counted(served, "made", 499) - before == 40 and blocker.is_alive()
    assert executed(served) - done == 1


def test_27_a_poison_sample_fails_alone(served: Any, second: float) -> None:
    images = [plain_images(i) for i in range(8)]
    images[3] = faulty_images(place=7)
    with busy(served, second / 3):
        found = at_once(served, [(image, {}) for image in images])
    assert [r.status for r in found] == [500 if i == 3 else 200 for i in range(8)]
    assert all(r.right(image) for r, image in zip(found, images, strict=True) if r.status == 200)


def test_30_an_engine_that_does_not_return(served: Any, second: float) -> None:
    start = time.monotonic()
    (reply,) = at_once(served, [(faulty_images(turns=1000 * second), {})])
    assert reply.status == 504 and reply.seconds > 2.9
    while served.ask("GET", "/v2/models/made/ready")[0] != 200:  # the runtime is told to stop
        assert time.monotonic() - start < 60
        time.sleep(0.01)


def test_31_memory_that_cannot_be_had(served: Any) -> None:
    content = body(entry(data=faulty_images(room=1).ravel().tolist()))
    with served.within(16 * 2**20):
        status, message = served.refused("POST", "/v2/models/made/infer", content)
    assert (status, message) == (500, "The model failed on this request.")


def series(served: Any) -> int:
    """How many numbers a scrape gets."""
    lines = served.ask("GET", "/metrics")[2].decode().splitlines()
    return sum(not line.startswith("#") for line in lines)


def test_32_unknown_names_share_a_label(served: Any) -> None:
    served.refused("GET", "/v2/models/unknown")
    before, count = series(served), counted(served, "_unknown", 404)
    kinds = (b"GET /v2/models/unknown-%d", b"POST /v2/models/unknown-%d/infer")
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        for start in range(0, 10_000, 100):
            names = range(start, start + 100)
            lines = [kinds[i % 2] % i + b" HTTP/1.1\r\nHost: a\r\n\r\n" for i in names]
            connection.sendall(b"".join(lines))
            found = b""
            while found.count(b'{"error":') < 100:
                found += connection.recv(65536)
            assert found.count(b"HTTP/1.1 404") == 100
    assert counted(served, "_unknown", 404) - count == 10_000
    assert series(served) == before
    assert b"unknown-" not in served.ask("GET", "/metrics")[2]


def test_33_errors_tell_nothing_of_the_host(served: Any) -> None:
    told = [
        served.refused("POST", "/v2/models/made/infer", body(entry(data=image.ravel().tolist())))
        for image in (faulty_images(place=9), faulty_images(room=1))
    ]
    told.append(served.refused("POST", "/v2/models/task/classify", PNG[:60]))
    told.append(served.refused("POST", INFER, b"\0" * 100))
    assert not any("/" in message for _, message in told)


def encoded(format: str, size: tuple[int, int] = (20, 20), **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise(size, 40).convert("RGB").save(stream, format, **options)
    return stream.getvalue()


PNG = encoded("PNG")
PICTURES: dict[str, tuple[bytes, int]] = {
    "34 empty": (b"", 400),
    "34 random": (b"\1\2\3" * 50, 415),
    "34 truncated": (PNG[:200], 400),
    "34 header only": (PNG[:33], 400),
    "34 HTML": (b"<html></html>", 415),
    "34 SVG": (b"<svg/>", 415),
    "34 PDF": (b"%PDF-1.7", 415),
    "36 TIFF": (encoded("TIFF"), 415),
    "36 GIF": (encoded("GIF"), 415),
    "36 EPS": (encoded("EPS"), 415),
    "36 BMP": (encoded("BMP"), 415),
    "36 PSD": (b"8BPS\0\1" + bytes(40), 415),
    "36 FITS": (b"SIMPLE  =                    T".ljust(2880), 415),
}


def form(content: bytes, name: str, kind: str) -> tuple[bytes, dict[str, str]]:
    """A multipart form with one file."""
    head = f'--x\r\nContent-Disposition: form-data; name="f"; filename="{name}"\r\n'
    head += f"Content-Type: {kind}\r\n\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    return head.encode() + content + b"\r\n--x--\r\n", headers


@pytest.mark.parametrize("name", PICTURES)
def test_a_bad_picture(served: Any, name: str) -> None:
    content, status = PICTURES[name]
    for kind in ("image/png", "application/octet-stream", "text/html"):
        headers = {"Content-Type": kind}
        assert served.refused("POST", CLASSIFY, content, headers)[0] == status
    renamed = form(content, "picture.png", "image/png")
    assert served.refused("POST", CLASSIFY, *renamed)[0] == status


def test_36_a_picture_s_name_and_kind_are_not_believed(served: Any) -> None:
    for name, kind in (("a.tiff", "image/tiff"), ("a.exe", "text/html"), ("../../a", "x")):
        assert served.ask("POST", CLASSIFY, *form(PNG, name, kind))[0] == 200


@pytest.mark.parametrize("name", LARGE)
def test_35_a_picture_of_too_many_pixels(served: Any, name: str) -> None:
    content = LARGE[name]()
    assert len(content) < 100_000
    with served.within(20 * 2**20):
        status, message = served.refused("POST", CLASSIFY, content)
    assert status == 413 and "pixels, above 10000000" in message


@pytest.mark.parametrize("name", BESIDE)
def test_35_a_picture_beside_much_else(served: Any, name: str) -> None:
    with served.within(20 * 2**20):
        assert served.refused("POST", CLASSIFY, BESIDE[name]())[0] == 400


def test_35_many_of_them_at_once(served: Any) -> None:
    pictures = [make() for make in LARGE.values()] * 5
    with served.within(20 * 2**20), ThreadPoolExecutor(10) as pool:
        found = list(pool.map(lambda p: served.refused("POST", CLASSIFY, p)[0], pictures))
    assert set(found) == {413}


def odd(make: Callable[..., Image.Image]) -> dict[str, tuple[bytes, Image.Image]]:
    """Pictures of unusual form, without loss, each with the plain one that it means."""
    plain = make(30, 20, seed=5)
    values = np.asarray(plain)
    grey = np.asarray(plain.convert("L"))
    seen = np.indices(grey.shape).sum(0) % 2 == 0
    on_white = np.where(seen, grey, 255).astype(np.uint8)
    palette = plain.quantize(16)
    exif = Image.Exif()
    exif[0x0112] = 6
    high = values.astype(">u2") * 257

    def saved(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
        stream = io.BytesIO()
        image.save(stream, format, **options)
        return stream.getvalue()

    def colour(pixels: Any) -> Image.Image:
        return Image.fromarray(np.asarray(pixels)).convert("RGB")

    lossless = {"lossless": True, "save_all": True, "append_images": [make(30, 20, seed=6)]}
    rows = b"".join(b"\0" + row.tobytes() for row in high)
    cmyk = saved(plain.convert("CMYK"), "JPEG", quality=95)
    long = make(30000, 1, seed=7)
    return {
        "16 bits, grey": (saved(Image.fromarray(grey.astype(np.uint16) * 257)), colour(grey)),
        "16 bits, colour": (png(30, 20, zlib.compress(rows), depth=16, kind=2), plain),
        "CMYK": (cmyk, Image.open(io.BytesIO(cmyk)).convert("RGB")),
        "LA": (
            saved(Image.fromarray(np.dstack([grey, seen * np.uint8(255)]), "LA")),
            colour(on_white),
        ),
        "P": (saved(palette), palette.convert("RGB")),
        "1": (saved(Image.fromarray(seen)), colour(seen * np.uint8(255))),
        "EXIF 6": (saved(plain.rotate(90, expand=True), exif=exif), plain),
        "animated PNG": (saved(plain, save_all=True, append_images=[make(30, 20, seed=6)]), plain),
        "animated WebP": (saved(plain, "WEBP", **lossless), plain),
        "1 x 1": (saved(plain.crop((0, 0, 1, 1))), plain.crop((0, 0, 1, 1))),
        "30000 x 1": (saved(long), long),
        "1 x 30000": (saved(long.rotate(90, expand=True)), long.rotate(90, expand=True)),
    }


def test_37_the_meaning_of_pixels(
    served: Any, artefact: Path, make_picture: Callable[..., Image.Image]
) -> None:
    pictures = odd(make_picture)
    wanted = load_classifier(artefact).classify([plain for _, plain in pictures.values()], top=5)
    for (name, (content, _)), row in zip(pictures.items(), wanted, strict=True):
        status, _, answer = served.ask("POST", CLASSIFY, content)
        assert status == 200, name
        (found,) = json.loads(answer)["predictions"]
        probabilities = {p["label"]: p["probability"] for p in found}
        owed = {p.label: p.probability for p in row}
        assert probabilities == pytest.approx(owed, abs=1e-6), name
    assert len({tuple(p.probability for p in row) for row in wanted}) > 6


@pytest.mark.parametrize("top", ["0", "-1", "x", "", "1" * 100, "1.5"])
def test_a_bad_number_of_classes(served: Any, top: str) -> None:
    status, message = served.refused("POST", f"/v2/models/task/classify?top={top}", PNG)
    assert status == 400 and "top is" in message
