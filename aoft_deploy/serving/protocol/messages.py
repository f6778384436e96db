"""Inference requests and answers of the Open Inference Protocol v2, from bytes and to bytes.

A message is JSON. If a header gives the length of the JSON, the data of the tensors follow it as
plain bytes (the binary tensor extension). Independent of server and engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from aoft_deploy.serving.protocol.refusals import Refusal
from aoft_deploy.serving.protocol.tensors import (
    Tensor,
    bytes_tensor,
    from_binary,
    from_json,
    read_shape,
    top_classes,
)
from aoft_deploy.texts import shortened

__all__ = ["OUTPUT", "VERSION", "InferRequest", "format_answer", "parse_request", "read_json"]

VERSION = "1"
"""The version of every model."""

OUTPUT = "logits"
MAX_ID = 1024
MAX_JSON = 32 * 2**20
"""Maximum bytes of JSON. As Python objects they take about ten times as much memory."""


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A request for the logits of a batch.

    Attributes:
        id: The client's name for the request, returned in the answer; may be empty.
        images: The batch, in the form of the model's input.
        timeout: Seconds that the client allows; None if it sets no limit.
        binary: Whether the answer's tensor is sent as bytes.
        top: Number of classes requested; 0 requests logits.
    """

    id: str
    images: NDArray[Any]
    timeout: float | None
    binary: bool
    top: int


def parse_request(
    body: bytes | memoryview, json_length: str | None, tensor: Tensor
) -> InferRequest:
    """Parse the body of an inference request.

    Args:
        body: The whole body, uncompressed.
        json_length: The header ``Inference-Header-Content-Length``; None if there is none.
        tensor: The model's input.

    Raises:
        Refusal: 400 for a malformed request, 413 for too much JSON.
    """
    length = _json_length(json_length, len(body))
    if length > MAX_JSON:
        raise Refusal(413, f"The JSON has {length} bytes, above {MAX_JSON}: send tensors as bytes.")
    data = read_json(body if length == len(body) else memoryview(body)[:length])
    parameters = _parameters(data)
    images = _input(data, memoryview(body)[length:], tensor)
    binary, top = _output(data, parameters)
    return InferRequest(_id(data), images, _timeout(parameters), binary, top)


def read_json(text: bytes | memoryview) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        Refusal: The text is not a JSON object, or is nested too deeply.
    """
    try:
        data = orjson.loads(text)
    except ValueError as error:
        raise Refusal(400, f"The body is not JSON ({error}).") from error
    if not isinstance(data, dict):
        raise Refusal(400, "The body is JSON, but not an object.")
    return data


def format_answer(
    model: str, request: InferRequest, logits: NDArray[np.float32], classes: Sequence[str]
) -> tuple[bytes, int | None]:
    """Format the body of an answer.

    Args:
        model: The model's name.
        request: The request.
        logits: (batch, classes).
        classes: Names of the classes, used if the request asks for classes.

    Returns:
        The body, and the length of its JSON if bytes follow.
    """
    output: dict[str, Any] = {"name": OUTPUT}
    answer: dict[str, Any] = {"model_name": model, "model_version": VERSION, "outputs": [output]}
    if request.id:
        answer["id"] = request.id
    if request.top:
        ranked = top_classes(logits, classes, request.top)
        texts = [text for row in ranked for text in row]
        output |= {"datatype": "BYTES", "shape": [len(ranked), len(ranked[0])]}
        if not request.binary:
            output["data"] = texts
        raw = bytes_tensor(texts) if request.binary else b""
    else:
        output |= {"datatype": "FP32", "shape": list(logits.shape)}
        if not request.binary:
            output["data"] = np.ascontiguousarray(logits, np.float32).ravel()
        raw = np.ascontiguousarray(logits, "<f4").tobytes() if request.binary else b""
    if not request.binary:
        return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY), None
    output["parameters"] = {"binary_data_size": len(raw)}
    text = orjson.dumps(answer)
    return text + raw, len(text)


def _json_length(header: str | None, total: int) -> int:
    if header is None:
        return total
    if not (header.isascii() and header.isdecimal() and len(header) <= 18 and int(header) <= total):
        raise Refusal(
            400,
            f"Inference-Header-Content-Length is {shortened(header)}: give the length of the JSON "
            f"in a body of {total} bytes.",
        )
    return int(header)


def _parameters(entry: dict[str, Any]) -> dict[str, Any]:
    found = entry.get("parameters")
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise Refusal(400, f"Parameters are {shortened(found)}: give an object.")
    return found


def _id(data: dict[str, Any]) -> str:
    name = data.get("id", "")
    if not isinstance(name, str) or len(name) > MAX_ID:
        raise Refusal(
            400, f"The id is {shortened(name)}: give a text of up to {MAX_ID} characters."
        )
    return name


def _timeout(parameters: dict[str, Any]) -> float | None:
    microseconds = parameters.get("timeout", 0)
    if type(microseconds) is not int or microseconds < 0:
        raise Refusal(400, f"The timeout is {shortened(microseconds)}: give whole microseconds.")
    return microseconds / 1e6 or None


def _entries(data: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = data.get(key)
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise Refusal(400, f"The {key} are {shortened(found)}: give a list of objects.")
    return found


def _input(data: dict[str, Any], tail: memoryview, tensor: Tensor) -> NDArray[Any]:
    entries = _entries(data, "inputs")
    if len(entries) != 1:
        raise Refusal(400, f"There are {len(entries)} inputs: give one, {tensor.name}.")
    (entry,) = entries
    if entry.get("name") != tensor.name:
        raise Refusal(400, f"Unknown input {shortened(entry.get('name'))}. Known: {tensor.name}.")
    if entry.get("datatype") != tensor.datatype:
        raise Refusal(
            400,
            f"{tensor.name} has data type {shortened(entry.get('datatype'))}: "
            f"give {tensor.datatype}.",
        )
    shape = read_shape(entry.get("shape"), tensor)
    parameters = _parameters(entry)
    if any(key.startswith("shared_memory") for key in parameters):
        raise Refusal(400, "Shared memory is not supported: send the data with the request.")
    size = parameters.get("binary_data_size")
    if size is None:
        if tail:
            raise Refusal(400, f"The {len(tail)} bytes after the JSON belong to no input.")
        return from_json(entry.get("data"), shape, tensor)
    if "data" in entry:
        raise Refusal(400, f"{tensor.name} has both data and binary_data_size: give one.")
    if type(size) is not int or size != len(tail):
        raise Refusal(
            400, f"binary_data_size is {shortened(size)}, but {len(tail)} bytes follow the JSON."
        )
    return from_binary(tail, shape, tensor)


def _output(data: dict[str, Any], parameters: dict[str, Any]) -> tuple[bool, int]:
    """Whether the answer's tensor is sent as bytes, and the number of classes requested."""
    binary = _flag(parameters, "binary_data_output", False)
    if data.get("outputs") in (None, []):
        return binary, 0
    entries = _entries(data, "outputs")
    if len(entries) != 1:
        raise Refusal(400, f"There are {len(entries)} outputs: give one, {OUTPUT}.")
    if entries[0].get("name") != OUTPUT:
        raise Refusal(400, f"Unknown output {shortened(entries[0].get('name'))}. Known: {OUTPUT}.")
    own = _parameters(entries[0])
    if any(key.startswith("shared_memory") for key in own):
        raise Refusal(400, "Shared memory is not supported: read the data from the answer.")
    top = own.get("classification", 0)
    if type(top) is not int or top < 0:
        raise Refusal(400, f"classification is {shortened(top)}: give the number of classes.")
    return _flag(own, "binary_data", binary), top


def _flag(parameters: dict[str, Any], key: str, default: bool) -> bool:
    value = parameters.get(key, default)
    if not isinstance(value, bool):
        raise Refusal(400, f"{key} is {shortened(value)}: give true or false.")
    return value
