"""Everything that goes wrong with a server, and what must come of it; it serves on after each.

The rows of the survey of failures, by number, and where each is tested:

    1-11        here (through a socket), and in test_serving_protocol.py
    12-18, 26   here; 12 and 13 also in test_serving_parts.py
    19-23       here
    24, 25, 27  here, and in test_serving_batcher.py
    28, 29      test_serving_server.py
    30-33       here
    34-37       here, and in test_serving_parts.py
    38-40       test_bad_input.py, test_published.py, test_checkpoint tests: nothing pickled is read
    41, 42      here and in test_serving_parts.py: only single-file ONNX is opened
    43          no archive is read; settings are TOML
    44          test_export.py, test_files.py
    45          test_tensorrt.py
    46          the demo's
"""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

TOKEN = "a token of more than sixteen bytes"
ADMIN = {"Authorization": f"Bearer {TOKEN}"}
INFER = "/v2/models/task/infer"
POST = b"POST /v2/models/task/infer HTTP/1.1\r\nHost: a\r\n"


def made(path: Path, metadata: dict[str, str]) -> Path:
    """An artefact whose pixels say what goes wrong.

    Of each image the first pixel's row says: [0] how many times a loop turns, in millions; [1]
    which row of a table of one row is looked up; [2] 10^14 floats to allocate, if not 0.
    """
    body = helper.make_graph(
        [helper.make_node("Add", ["sum", "one"], ["more"])],
        "turn",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum", TensorProto.FLOAT, []),
        ],
        [
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("more", TensorProto.FLOAT, []),
        ],
    )
    constants = {
        "zero": np.int64(0),
        "1st": np.int64(1),
        "2nd": np.int64(2),
        "one": np.float32(1),
        "start": np.float32(0),
        "million": np.float32(1e6),
        "huge": np.float32(1e14),
        "table": np.zeros((1, 5), np.float32),
        "flat": np.array([-1, 768], np.int64),
        "single": np.array([1], np.int64),
        "nothing": np.float32(1e-30),
        "weights": np.random.default_rng(0).normal(size=(768, 5)).astype(np.float32),
    }
    node = helper.make_node
    nodes = [
        node("Gather", ["pixel_values", "zero"], ["plane"], axis=1),
        node("Gather", ["plane", "zero"], ["row"], axis=1),
        node("Gather", ["row", "zero"], ["turns"], axis=1),
        node("Gather", ["row", "1st"], ["place"], axis=1),
        node("Gather", ["row", "2nd"], ["room"], axis=1),
        node("ReduceMax", ["turns"], ["most"], keepdims=0),
        node("Mul", ["most", "million"], ["millions"]),
        node("Cast", ["millions"], ["count"], to=TensorProto.INT64),
        node("Loop", ["count", "", "start"], ["turned"], body=body),
        node("Cast", ["place"], ["index"], to=TensorProto.INT64),
        node("Gather", ["table", "index"], ["found"], axis=0),
        node("ReduceMax", ["room"], ["largest"], keepdims=0),
        node("Mul", ["largest", "huge"], ["floats"]),
        node("Cast", ["floats"], ["wanted"], to=TensorProto.INT64),
        node("Reshape", ["wanted", "single"], ["shape"]),
        node("ConstantOfShape", ["shape"], ["filled"]),
        node("ReduceSum", ["filled"], ["filling"], keepdims=0),
        node("Reshape", ["pixel_values", "flat"], ["vector"]),
        node("MatMul", ["vector", "weights"], ["plain"]),
        node("Add", ["plain", "found"], ["looked"]),
        node("Mul", ["turned", "nothing"], ["turning"]),
        node("Add", ["looked", "turning"], ["slow"]),
        node("Add", ["slow", "filling"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, 16, 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 5])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def made_artefact(artefact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    metadata = {entry.key: entry.value for entry in onnx.load(artefact).metadata_props}
    return made(tmp_path_factory.mktemp("made") / "made.onnx", metadata)


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
    options += ["--queue", 32, "--body-timeout", 2, "--max-body", 4 * 2**20]
    options += ["--max-pixels", 10**7, "--engine-timeout", 3]
    server = serve(f"task={artefact}", made_artefact, fleet_artefact, *options)
    server.expected = server.logits("task", IMAGES)
    for _ in range(50):
        server.logits("task", IMAGES)
    server.baseline = server.memory()
    return server


IMAGES = np.random.default_rng(3).normal(size=(2, 3, 16, 16)).astype(np.float32)


@pytest.fixture(scope="module", params=["httptools", "h11"])
def wire(request: pytest.FixtureRequest, serve: Callable[..., Any], artefact: Path) -> Any:
    """A server on each HTTP parser."""
    options = ["--http", request.param, "--body-timeout", 2, "--max-body", 4 * 2**20]
    server = serve(f"task={artefact}", *options)
    server.expected = server.logits("task", IMAGES)
    return server


@pytest.fixture(autouse=True)
def alive_ready_and_right(served: Any) -> Iterator[None]:
    yield
    assert served.process.poll() is None
    assert served.ask("GET", "/v2/health/ready")[0] == 200
    assert np.array_equal(served.logits("task", IMAGES), served.expected)
    assert served.memory() < served.baseline + 120 * 2**20
    failed = [event for event in served.events if event["event"] in ("request failed", "library")]
    assert not failed


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


def asking(**said: float) -> Any:
    """An image for the made artefact."""
    image = np.zeros((1, 3, 16, 16), np.float32)
    for name, value in said.items():
        image[0, 0, 0, ("turns", "place", "room").index(name)] = value
    return image


def raw(served: Any, *parts: bytes, seconds: float = 5) -> bytes:
    """All that the server sends back to bytes, until it closes or the time is up."""
    found = b""
    with socket.create_connection(("127.0.0.1", served.port), timeout=seconds) as connection:
        try:
            for part in parts:
                connection.sendall(part)
            while piece := connection.recv(65536):
                found += piece
        except (TimeoutError, ConnectionError):
            pass
    return found


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
    assert served.refused("POST", INFER, content)[0] == status


def test_7_depth_in_the_repository_index(served: Any) -> None:
    for content in (b'{"a":' * 250_000, b"[" * 60_000, b"{"):
        assert served.refused("POST", "/v2/repository/index", content)[0] in (400, 413)


@pytest.mark.parametrize("length", ["-1", "99999999999", "abc", "1" * 1000])
def test_10_a_bad_length_of_the_json(served: Any, length: str) -> None:
    headers = {"Inference-Header-Content-Length": length}
    assert served.refused("POST", INFER, body(), headers)[0] == 400


@pytest.mark.parametrize("size", [10**12, -4, 3071, 3073])
def test_11_a_bad_size_of_the_binary_part(served: Any, size: int) -> None:
    text = json.dumps(
        {"inputs": [entry() | {"parameters": {"binary_data_size": size}, "data": None}]}
    ).replace(', "data": null', "")
    headers = {"Inference-Header-Content-Length": str(len(text))}
    for tail in (bytes(3072), bytes(3071), bytes(3073), b""):
        content = text.encode() + tail
        assert served.refused("POST", INFER, content, headers)[0] == 400


def test_12_bad_compression(served: Any) -> None:
    good = gzip.compress(body())
    for content in (b"garbage", good[:-5], b"", good + good):
        assert served.refused("POST", INFER, content, {"Content-Encoding": "gzip"})[0] == 400
    assert served.refused("POST", INFER, good, {"Content-Encoding": "br"})[0] == 415
    pack = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join(pack.compress(bytes(2**20)) for _ in range(512)) + pack.flush()
    before, start = served.memory(), time.monotonic()
    assert served.refused("POST", INFER, bomb, {"Content-Encoding": "gzip"})[0] == 413
    assert time.monotonic() - start < 1 and served.memory() - before < 16 * 2**20


def test_13_a_body_that_is_too_large(wire: Any) -> None:
    start = time.monotonic()
    answer = raw(wire, POST + b"Content-Length: 1000000000000\r\n\r\n{}")
    assert b" 413 " in answer and time.monotonic() - start < 3
    piece = b"10000\r\n" + bytes(65536) + b"\r\n"
    answer = raw(wire, POST + b"Transfer-Encoding: chunked\r\n\r\n", *[piece] * 80)
    assert b" 413 " in answer
    assert wire.refused("POST", INFER, bytes(5 * 2**20))[0] == 413
    assert np.array_equal(wire.logits("task", IMAGES), wire.expected)


def test_14_many_chunks(wire: Any) -> None:
    head = POST + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = b"1\r\n \r\n" * 100_000 + b"0\r\n\r\n"
    assert b" 400 " in raw(wire, head, chunks, seconds=20)
    assert np.array_equal(wire.logits("task", IMAGES), wire.expected)


SMUGGLED = {
    "two ways of length": b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET",
    "two lengths": b"Content-Length: 4\r\nContent-Length: 5\r\n\r\n{}  ",
    "no number": b"Content-Length: abc\r\n\r\n{}",
    "bad chunk": b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "NUL": b"X-A: \0\r\nContent-Length: 2\r\n\r\n{}",
    "300 headers": b"A: b\r\n" * 300 + b"Content-Length: 2\r\n\r\n{}",
    "folded": b"X-A: b\r\n c: d\r\nContent-Length: 2\r\n\r\n{}",
}


@pytest.mark.parametrize("name", SMUGGLED)
def test_15_ambiguous_requests(wire: Any, name: str) -> None:
    answer = raw(wire, POST + b"Connection: close\r\n" + SMUGGLED[name], seconds=2)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400")
    assert answer.count(b"HTTP/1.1") <= 1 or b" 200 " not in answer
    assert np.array_equal(wire.logits("task", IMAGES), wire.expected)


@pytest.mark.parametrize("line", [b"A: " + b"a" * 65536, b"A: b\r\n" * 11_000])
def test_16_endless_headers(wire: Any, line: bytes) -> None:
    before = wire.memory()
    answer = raw(wire, b"GET /v2 HTTP/1.1\r\nHost: a\r\n", *[line] * 200)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    assert wire.memory() - before < 16 * 2**20
    assert np.array_equal(wire.logits("task", IMAGES), wire.expected)


def test_17_slow_clients(wire: Any) -> None:
    head = POST + b"Content-Length: 9\r\n\r\n{}"
    slow = []
    for _ in range(300):
        slow.append(socket.create_connection(("127.0.0.1", wire.port), timeout=10))
        slow[-1].sendall(head)
    start = time.monotonic()
    assert np.array_equal(wire.logits("task", IMAGES), wire.expected)
    assert time.monotonic() - start < 0.5
    for connection in slow:
        found = b""
        while piece := connection.recv(4096):
            found += piece
        assert b" 408 " in found and b"did not arrive" in found
        connection.close()
    assert time.monotonic() - start < 5
    assert np.array_equal(wire.logits("task", IMAGES), wire.expected)


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


def test_20_the_repository_is_changed_with_the_token_only(served: Any) -> None:
    for token in (None, "", "Bearer", "Bearer ", f"Bearer {TOKEN}x", TOKEN, "Bearer \xff"):
        headers = {} if token is None else {"Authorization": token}
        for change in ("load", "unload"):
            address = f"/v2/repository/models/task/{change}"
            assert served.refused("POST", address, b"{}", headers)[0] == 403


@pytest.mark.parametrize(
    "parameters",
    [
        {"config": "{}"},
        {"file:../../x": "aGk="},
        {"file:1/model.onnx": "aGk="},
        {"source": "http://127.0.0.1:9/x.onnx"},
        [],
        "x",
        1,
    ],
)
def test_21_nothing_is_loaded_that_the_client_sends(
    served: Any, repository: Path, parameters: Any
) -> None:
    before = sorted(repository.parent.rglob("*"))
    address = "/v2/repository/models/task/load"
    content = json.dumps({"parameters": parameters})
    if parameters == []:  # as good as none
        assert served.ask("POST", address, content, ADMIN)[0] == 200
    else:
        assert served.refused("POST", address, content, ADMIN)[0] == 400
    for name in ("outside", "..%2Foutside", "x" * 256, "http:%2F%2F127.0.0.1:9%2Fx"):
        address = f"/v2/repository/models/{name}/load"
        assert served.refused("POST", address, b"{}", ADMIN)[0] in (400, 404)
    assert sorted(repository.parent.rglob("*")) == before


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


@pytest.mark.parametrize(
    "fault", ["truncated", "random", "outside", "opset", "unknown", "no model"]
)
def test_23_a_bad_artefact_does_not_take_a_good_one_s_place(
    served: Any, repository: Path, artefact: Path, fault: str
) -> None:
    path = repository / "changing.onnx"
    proto = onnx.load(artefact)
    if fault == "outside":
        onnx.external_data_helper.set_external_data(proto.graph.initializer[0], "../secret")
        proto.graph.initializer[0].ClearField("raw_data")
    elif fault == "opset":
        proto.opset_import[0].version = 999
    elif fault == "unknown":
        proto.graph.node[0].op_type = "Nonsense"
    elif fault == "no model":
        del proto.metadata_props[:]
    content = proto.SerializeToString()
    if fault == "truncated":
        content = content[: len(content) // 2]
    elif fault == "random":
        content = os.urandom(5000)
    path.write_bytes(content)
    try:
        before = served.logits("changing", IMAGES)
        address = "/v2/repository/models/changing/load"
        status, message = served.refused("POST", address, b"", ADMIN)
        assert status == 400 and "changing was not loaded" in message
        index = json.loads(served.ask("POST", "/v2/repository/index")[2])
        (told,) = [e for e in index if e["name"] == "changing"]
        assert told["state"] == "READY" and "changing.onnx" in told["reason"]
        for text in (message, told["reason"]):
            assert str(repository) not in text and "/tmp" not in text
        assert np.array_equal(served.logits("changing", IMAGES), before)
    finally:
        shutil.copy(artefact, path)
    assert served.ask("POST", "/v2/repository/models/changing/load", b"", ADMIN)[0] == 200


def test_23_a_bad_checkpoint_does_not_take_a_task_s_place(
    served: Any, repository: Path, fleet_tasks: dict[str, Path], checkpoint: Path
) -> None:
    path, address = repository / "zürich.ckpt", "/v2/repository/models/z%C3%BCrich/load"
    before = served.logits("z%C3%BCrich", IMAGES)
    for content in (b"\x80\x04junk", path.read_bytes()[:-9], checkpoint.read_bytes()):
        path.write_bytes(content)
        status, message = served.refused("POST", address, b"", ADMIN)
        assert status == 400 and str(repository) not in message
        assert np.array_equal(served.logits("z%C3%BCrich", IMAGES), before)
    shutil.copy(fleet_tasks["pets"], path)
    assert served.ask("POST", address, b"", ADMIN)[0] == 200
    assert np.allclose(
        served.logits("z%C3%BCrich", IMAGES), served.logits("pets", IMAGES), atol=1e-5
    )
    shutil.copy(fleet_tasks["zürich"], path)
    assert served.ask("POST", address, b"", ADMIN)[0] == 200


@pytest.fixture(scope="module")
def second(served: Any) -> float:
    """Millions of turns that take the made artefact about a second."""
    served.logits("made", asking(turns=0.01))
    start = time.monotonic()
    served.logits("made", asking(turns=0.05))
    return 0.05 / (time.monotonic() - start)


def at_once(
    served: Any, requests: list[tuple[Any, dict[str, Any]]], model: str = "made"
) -> list[tuple[int, float, dict[str, str]]]:
    """Status, seconds and headers of requests that begin together."""
    barrier = threading.Barrier(len(requests))

    def one(request: tuple[Any, dict[str, Any]]) -> tuple[int, float, dict[str, str]]:
        image, rest = request
        content = body(entry(data=image.ravel().tolist()), **rest)
        barrier.wait()
        start = time.monotonic()
        status, headers, _ = served.ask("POST", f"/v2/models/{model}/infer", content)
        return status, time.monotonic() - start, headers

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(one, requests))


def test_24_overload(served: Any, second: float) -> None:
    blocker = threading.Thread(target=served.logits, args=("made", asking(turns=second)))
    blocker.start()
    time.sleep(0.2)
    found = at_once(served, [(asking(), {})] * 120)
    blocker.join()
    refused = [(seconds, headers) for status, seconds, headers in found if status == 429]
    assert sum(status == 200 for status, _, _ in found) == 32 and len(refused) == 88
    assert all(int(headers["retry-after"]) >= 1 for _, headers in refused)
    assert sorted(seconds for seconds, _ in refused)[40] < 0.5  # 120 clients on the same cores


def test_25_time_runs_out_in_the_queue(served: Any, second: float) -> None:
    blocker = threading.Thread(target=served.logits, args=("made", asking(turns=second)))
    blocker.start()
    time.sleep(0.2)
    before = executed(served)
    ((status, seconds, _),) = at_once(served, [(asking(), {"parameters": {"timeout": 1000}})])
    assert status == 504 and seconds < 0.2 and blocker.is_alive()
    blocker.join()
    served.logits("made", asking())
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
    blocker = threading.Thread(target=served.logits, args=("made", asking(turns=second)))
    blocker.start()
    time.sleep(0.1)
    content = body(entry(data=asking().ravel().tolist()))
    head = b"POST /v2/models/made/infer HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"
    for cut in (10, len(content)):
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", served.port)) as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.sendall(head % len(content) + content[:cut])
                time.sleep(0.01)
    time.sleep(0.15)
    text = served.ask("GET", "/metrics")[2].decode()
    assert 'aoft_queue_depth{artefact="made"} 0' in text and "aoft_in_flight 2" in text
    assert counted(served, "made", 499) - before == 40
    blocker.join()
    assert executed(served) - done == 1


def test_27_a_poison_sample_fails_alone(served: Any, second: float) -> None:
    blocker = threading.Thread(target=served.logits, args=("made", asking(turns=second / 3)))
    blocker.start()
    time.sleep(0.1)
    found = at_once(served, [(asking(place=7.0 * (i == 3)), {}) for i in range(8)])
    blocker.join()
    assert [status for status, _, _ in found] == [500 if i == 3 else 200 for i in range(8)]


def test_30_an_engine_that_does_not_return(served: Any, second: float) -> None:
    start = time.monotonic()
    ((status, seconds, _),) = at_once(served, [(asking(turns=1000 * second), {})])
    assert status == 504 and 2.9 < seconds < 3.5
    while served.ask("GET", "/v2/models/made/ready")[0] != 200:  # the runtime is told to stop
        assert time.monotonic() - start < 6
        time.sleep(0.01)
    served.logits("made", asking())


def test_31_memory_that_cannot_be_had(served: Any) -> None:
    content = body(entry(data=asking(room=1).ravel().tolist()))
    status, message = served.refused("POST", "/v2/models/made/infer", content)
    assert (status, message) == (500, "The model failed on this request.")


def test_32_unknown_names_share_a_label(served: Any) -> None:
    for i in range(200):
        served.refused("POST", f"/v2/models/unknown-{i}/infer", b"")
    text = served.ask("GET", "/metrics")[2].decode()
    assert "unknown-1" not in text
    assert counted(served, "_unknown", 404) >= 200


def test_33_errors_tell_nothing_of_the_host(served: Any, tmp_path: Path) -> None:
    told = [
        served.refused("POST", "/v2/models/made/infer", body(entry(data=image.ravel().tolist())))
        for image in (asking(place=9), asking(room=1))
    ]
    told.append(served.refused("POST", "/v2/models/task/classify", PNG[:60]))
    told.append(served.refused("POST", INFER, b"\0" * 100))
    for _, message in told:
        assert not any(word in message for word in ("/", "Traceback", "onnxruntime", ".py", "0x"))


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
    "35 bomb": (encoded("PNG", (4000, 3000), compress_level=1), 413),
    "36 TIFF": (encoded("TIFF"), 415),
    "36 GIF": (encoded("GIF"), 415),
    "36 EPS": (encoded("EPS"), 415),
    "36 BMP": (encoded("BMP"), 415),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_bad_picture(served: Any, name: str) -> None:
    content, status = PICTURES[name]
    for kind in ("image/png", "application/octet-stream", "text/html"):
        address = "/v2/models/task/classify"
        assert served.refused("POST", address, content, {"Content-Type": kind})[0] == status


@pytest.mark.parametrize("top", ["0", "-1", "x", "", "1" * 100, "1.5"])
def test_a_bad_number_of_classes(served: Any, top: str) -> None:
    status, message = served.refused("POST", f"/v2/models/task/classify?top={top}", PNG)
    assert status == 400 and "top is" in message
