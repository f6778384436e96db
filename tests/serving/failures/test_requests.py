"""Malformed requests, unknown models and wrong methods are refused."""

from __future__ import annotations

from typing import Any

import pytest
from failure_requests import (
    ADMIN,
    INFER,
    PNG,
    binary,
    body,
    entry,
)

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
def test_a_malformed_request_is_refused(served: Any, name: str) -> None:
    content, status = BAD_REQUESTS[name]
    with served.within((8 if name.startswith("5") else 48) * 2**20):
        assert served.refused("POST", INFER, content)[0] == status


def test_deeply_nested_json_is_refused_by_the_repository_index(served: Any) -> None:
    for content in (b'{"a":' * 250_000, b"[" * 60_000, b"{"):
        assert served.refused("POST", "/v2/repository/index", content)[0] in (400, 413)


LENGTH = len(body())


@pytest.mark.parametrize(
    "length",
    ["-1", "99999999999", "abc", "1" * 1000, str(LENGTH + 1), str(LENGTH - 1), "+9", "9.0"],
)
def test_a_wrong_json_length_is_refused(served: Any, length: str) -> None:
    headers = {"Inference-Header-Content-Length": length}
    assert served.refused("POST", INFER, body(), headers)[0] == 400
    headers = {"Inference-Header-Content-Length": str(LENGTH)}
    assert served.ask("POST", INFER, body(), headers)[0] == 200


@pytest.mark.parametrize("size", [10**12, -4, 3071, 3072, 3073])
def test_a_wrong_binary_size_is_refused(served: Any, size: int) -> None:
    for tail in (3072, 3071, 3073, 0):
        if (size, tail) == (3072, 3072):
            assert served.ask("POST", INFER, *binary(size, tail))[0] == 200
        else:
            assert served.refused("POST", INFER, *binary(size, tail))[0] == 400


def test_a_large_shape_with_few_bytes_takes_no_memory(served: Any) -> None:
    with served.within(8 * 2**20):
        for size, tail in ((4, 4), (10**9 * 3072, 4), (10**9 * 3072, 3072)):
            request = binary(size, tail, shape=[10**9, 3, 16, 16])
            assert served.refused("POST", INFER, *request)[0] == 400


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
def test_unknown_models_are_refused(served: Any, name: str) -> None:
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


def test_unknown_versions_and_wrong_methods_are_refused(served: Any) -> None:
    for version in ("99", "abc", "0", "-1", "1.0"):
        address = f"/v2/models/task/versions/{version}"
        assert served.refused("POST", address + "/infer", body())[0] == 404
        assert served.refused("GET", address)[0] == 404
    for method in ("GET", "PUT", "DELETE", "PATCH"):
        assert served.refused(method, INFER)[0] == 405
    assert served.refused("POST", "/v2")[0] == 405
    assert served.refused("GET", "/")[0] == 404
    assert served.ask("POST", "/v2/models/task/versions/1/infer", body())[0] == 200


@pytest.mark.parametrize("top", ["0", "-1", "x", "", "1" * 100, "1.5"])
def test_a_bad_number_of_classes_is_refused(served: Any, top: str) -> None:
    status, message = served.refused("POST", f"/v2/models/task/classify?top={top}", PNG)
    assert status == 400 and "top is" in message
