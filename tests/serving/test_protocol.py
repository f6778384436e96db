"""Parsing inference requests, formatting answers, and refusing malformed requests."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from aoft_deploy.serving.protocol.messages import InferRequest, format_answer, parse_request
from aoft_deploy.serving.protocol.refusals import Refusal
from aoft_deploy.serving.protocol.tensors import Tensor

FLOATS = Tensor("pixel_values", "FP32", (3, 2, 2))
PIXELS = Tensor("image", "UINT8", (2, 2, 3))
VALUES = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2) / 7


def entry(**changes: Any) -> dict[str, Any]:
    data = VALUES.ravel().tolist()
    base = {"name": "pixel_values", "datatype": "FP32", "shape": [2, 3, 2, 2], "data": data}
    return {key: value for key, value in {**base, **changes}.items() if value is not ...}


def body(*inputs: Any, **rest: Any) -> bytes:
    return json.dumps({"inputs": list(inputs) or [entry()], **rest}).encode()


def binary(tail: bytes, size: Any = None, **changes: Any) -> tuple[bytes, str]:
    parameters = {"binary_data_size": len(tail) if size is None else size}
    text = body(entry(data=..., parameters=parameters, **changes))
    return text + tail, str(len(text))


def refused(content: bytes, length: str | None = None, tensor: Tensor = FLOATS) -> Refusal:
    with pytest.raises(Refusal) as caught:
        parse_request(content, length, tensor)
    assert caught.value.status in (400, 413) and len(caught.value.message) < 300
    return caught.value


@pytest.mark.parametrize("form", ["flat", "nested", "binary", "binary without JSON length"])
def test_a_batch_is_parsed_from_every_form(form: str) -> None:
    length = None
    if form == "flat":
        content = body()
    elif form == "nested":
        content = body(entry(data=VALUES.tolist()))
    else:
        content, length = binary(VALUES.tobytes())
    if form == "binary without JSON length":
        assert "not JSON" in refused(content).message
        return
    request = parse_request(content, length, FLOATS)
    assert np.array_equal(request.images, VALUES) and request.images.dtype == np.float32
    assert (request.id, request.timeout, request.binary, request.top) == ("", None, False, 0)


def test_binary_data_are_not_copied() -> None:
    content, length = binary(VALUES.tobytes())
    images = parse_request(content, length, FLOATS).images
    assert np.shares_memory(images, np.frombuffer(content, np.uint8))


def test_pixels_are_parsed_from_bytes_or_integers() -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
    shape = {"name": "image", "datatype": "UINT8", "shape": [1, 2, 2, 3]}
    content, length = binary(pixels.tobytes(), **shape)
    assert np.array_equal(parse_request(content, length, PIXELS).images, pixels)
    content = body({**shape, "data": pixels.tolist()})
    assert np.array_equal(parse_request(content, None, PIXELS).images, pixels)
    for wrong in (-1, 256, 2**64 - 1):
        content = body({**shape, "data": [wrong, *[0] * 11]})
        assert "0 to 255" in refused(content, tensor=PIXELS).message
    content = body({**shape, "data": [0.5, *[0] * 11]})
    assert "whole numbers" in refused(content, tensor=PIXELS).message


def test_the_options_of_a_request_are_parsed() -> None:
    parameters = {"timeout": 1500, "binary_data_output": True, "priority": 1, "sequence_id": 0}
    request = parse_request(body(id="x", parameters=parameters), None, FLOATS)
    assert (request.id, request.timeout, request.binary) == ("x", 0.0015, True)
    own = [{"name": "logits", "parameters": {"binary_data": False, "classification": 3}}]
    request = parse_request(body(outputs=own, parameters=parameters), None, FLOATS)
    assert (request.binary, request.top) == (False, 3)


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not JSON"),
    "cut": (b"{oops", "not JSON"),
    "list": (b"[]", "not an object"),
    "null": (b"null", "not an object"),
    "bad UTF-8": (b'{"id": "\xff"}', "not JSON"),
    "inputs an object": (b'{"inputs": {}}', "list of objects"),
    "inputs numbers": (b'{"inputs": [1]}', "list of objects"),
    "no inputs": (b"{}", "list of objects"),
    "input missing": (b'{"inputs": []}', "There are 0 inputs"),
    "input unknown": (body(entry(name="y")), "Unknown input 'y'"),
    "input twice": (body(entry(), entry()), "There are 2 inputs"),
    "type unknown": (body(entry(datatype="FLOATY")), "data type 'FLOATY'"),
    "type another": (body(entry(datatype="FP64")), "data type 'FP64'"),
    "rank": (body(entry(shape=[24])), "Shape of pixel_values"),
    "axis": (body(entry(shape=[2, 3, 2, 3])), "Shape of pixel_values"),
    "zero": (body(entry(shape=[0, 3, 2, 2], data=[])), "Shape of pixel_values"),
    "negative": (body(entry(shape=[-1, 3, 2, 2])), "Shape of pixel_values"),
    "fraction": (body(entry(shape=[1.5, 3, 2, 2])), "Shape of pixel_values"),
    "text axis": (body(entry(shape=["1", 3, 2, 2])), "Shape of pixel_values"),
    "true axis": (body(entry(shape=[True, 3, 2, 2])), "Shape of pixel_values"),
    "no shape": (body(entry(shape=...)), "Shape of pixel_values"),
    "overflow": (body(entry(shape=[2**62, 2**62])), "Shape of pixel_values"),
    "overflow of the batch": (body(entry(shape=[2**62, 3, 2, 2])), "numbers: shape"),
    "expansion": (body(entry(shape=[10**9, 3, 2, 2], data=[1])), "are 1 numbers: shape"),
    "too few": (body(entry(data=[1.0])), "are 1 numbers"),
    "too many": (body(entry(data=[0.5] * 25)), "are 25 numbers"),
    "ragged": (body(entry(data=[[[[1.0, 2.0], [1.0]]] * 3] * 2)), "lists of 2 on axis 3"),
    "half nested": (body(entry(data=[[1.0] * 12] * 2)), "lists of 3 on axis 1"),
    "strings": (body(entry(data=["1"] * 24)), "not all numbers"),
    "null data": (body(entry(data=[None] * 24)), "not all numbers"),
    "true data": (body(entry(data=[True] * 24)), "not all numbers"),
    "data no list": (body(entry(data="1")), "give a list of numbers"),
    "no data": (body(entry(data=...)), "give a list of numbers"),
    "NaN": (body(entry(data=[math.nan] * 24)), "not JSON"),
    "1e400": (body().replace(b"0.0", b"1e400"), "not JSON"),
    "beyond float32": (body(entry(data=[1e39] * 24)), "not all finite"),
    "10,000 digits": (body().replace(b"0.0", b"1" * 10_000), "not JSON"),
    "depth": (b'{"inputs":' + b"[" * 250_000, "not JSON"),
    "long id": (body(id="x" * 2**20), "The id is"),
    "number as id": (body(id=7), "The id is"),
    "parameters a list": (body(parameters=[]), "Parameters are"),
    "timeout a text": (body(parameters={"timeout": "1"}), "The timeout is '1'"),
    "timeout negative": (body(parameters={"timeout": -1}), "The timeout is -1"),
    "flag a number": (body(parameters={"binary_data_output": 1}), "true or false"),
    "output unknown": (body(outputs=[{"name": "y"}]), "Unknown output 'y'"),
    "output twice": (body(outputs=[{"name": "logits"}] * 2), "There are 2 outputs"),
    "100,000 outputs": (body(outputs=[{"name": "logits"}] * 100_000), "100000 outputs"),
    "outputs numbers": (body(outputs=[1]), "list of objects"),
    "classes a text": (
        body(outputs=[{"name": "logits", "parameters": {"classification": "1"}}]),
        "classification is '1'",
    ),
    "classes negative": (
        body(outputs=[{"name": "logits", "parameters": {"classification": -1}}]),
        "classification is -1",
    ),
    "shared memory": (body(entry(parameters={"shared_memory_region": "a"})), "Shared memory"),
    "shared memory out": (
        body(outputs=[{"name": "logits", "parameters": {"shared_memory_region": "a"}}]),
        "Shared memory",
    ),
    "data twice": (body(entry(parameters={"binary_data_size": 0})), "both data and"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_refused_with_the_reason(name: str) -> None:
    content, words = BAD[name]
    assert words in refused(content).message


@pytest.mark.parametrize("length", ["-1", "+5", " 5", "abc", "", "99999999999", "1" * 5000, "٣"])
def test_a_wrong_header_of_the_json_length_is_refused(length: str) -> None:
    assert "Inference-Header-Content-Length" in refused(body(), length).message


@pytest.mark.parametrize("size", [10**12, -4, 95, 97, 96.0, True, "96"])
def test_a_wrong_binary_data_size_is_refused(size: Any) -> None:
    content, length = binary(VALUES.tobytes(), size)
    assert "binary_data_size" in refused(content, length).message


def test_missing_or_extra_bytes_are_refused() -> None:
    for tail in (VALUES.tobytes()[:-1], VALUES.tobytes() + b"\0"):
        assert f"has {len(tail)} bytes" in refused(*binary(tail)).message
    text = body()
    assert "belong to no input" in refused(text + b"extra", str(len(text))).message
    nan = VALUES.copy()
    nan[1, 2, 1, 1] = np.nan
    assert "not all finite" in refused(*binary(nan.tobytes())).message


def test_too_much_json_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aoft_deploy.serving.protocol.messages.MAX_JSON", 100)
    assert refused(body()).status == 413


def answered(request: InferRequest, logits: Any, classes: Any = "abcd") -> tuple[Any, bytes]:
    content, length = format_answer("m", request, np.asarray(logits, np.float32), tuple(classes))
    cut = len(content) if length is None else length
    return orjson.loads(content[:cut]), content[cut:]


def asking(**changes: Any) -> InferRequest:
    values = {"id": "", "images": VALUES, "timeout": None, "binary": False, "top": 0, **changes}
    return InferRequest(**values)


LOGITS = [[0.25, -1.5, 3.0, 3.0], [1.0, 2.0, 0.0, -7.0]]


def test_logits_are_sent_as_json_or_bytes() -> None:
    head, tail = answered(asking(id="é"), LOGITS)
    assert (head["model_name"], head["model_version"], head["id"]) == ("m", "1", "é")
    assert tail == b"" and head["outputs"] == [
        {"name": "logits", "datatype": "FP32", "shape": [2, 4], "data": [*LOGITS[0], *LOGITS[1]]}
    ]
    head, tail = answered(asking(binary=True), np.asarray(LOGITS)[:, ::-1])
    assert "id" not in head and head["outputs"][0]["parameters"] == {"binary_data_size": 32}
    assert np.array_equal(np.frombuffer(tail, "<f4").reshape(2, 4)[:, ::-1], LOGITS)


def test_classes_are_formatted_as_score_index_label_best_first() -> None:
    expected = ["3.000000:2:c", "3.000000:3:d", "2.000000:1:b", "1.000000:0:zürich"]
    head, _ = answered(asking(top=2), LOGITS, ("zürich", "b", "c", "d"))
    output = head["outputs"][0]
    assert (output["datatype"], output["shape"], output["data"]) == ("BYTES", [2, 2], expected)
    head, tail = answered(asking(top=2, binary=True), LOGITS, ("zürich", "b", "c", "d"))
    texts = [text.encode() for text in expected]
    assert tail == b"".join(struct.pack("<I", len(text)) + text for text in texts)
    head, _ = answered(asking(top=9), LOGITS)
    assert head["outputs"][0]["shape"] == [2, 4]


LARGE = float(np.float32(1e30))
NUMBERS = st.floats(-LARGE, LARGE, width=32)


@settings(max_examples=60, deadline=None)
@given(array=arrays(np.float32, (2, 3, 2, 2), elements=NUMBERS), nested=st.booleans())
def test_every_finite_batch_survives_json_and_bytes(array: Any, nested: bool) -> None:
    data = array.tolist() if nested else array.ravel().tolist()
    for content, length in ((body(entry(data=data)), None), binary(array.tobytes())):
        assert np.array_equal(parse_request(content, length, FLOATS).images, array)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_corrupted_request_is_answered_or_refused(data: st.DataObject) -> None:
    whole: Any = orjson.loads(body(id="x", parameters={}, outputs=[{"name": "logits"}]))
    target: Any = data.draw(st.sampled_from([whole, whole["inputs"][0], whole["outputs"][0]]))
    key = data.draw(st.sampled_from(sorted(target)) | st.just("parameters"))
    target[key] = data.draw(JUNK)
    length = data.draw(st.none() | st.integers(-3, 400).map(str) | st.text(max_size=4))
    tail = data.draw(st.binary(max_size=100))
    try:
        request = parse_request(json.dumps(whole).encode() + tail, length, FLOATS)
    except Refusal as refusal:
        assert refusal.status == 400
    else:
        assert request.images.shape[1:] == FLOATS.shape and np.isfinite(request.images).all()


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=200), length=st.none() | st.text(max_size=5))
def test_random_bytes_are_refused(content: bytes, length: str | None) -> None:
    refused(content, length)
