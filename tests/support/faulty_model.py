"""A model whose images can make it fail, and raw connections to its server."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from aoft_deploy.artefacts.onnx_metadata import DIGEST

WEIGHTS = np.random.default_rng(0).normal(size=(768, 5)).astype(np.float32)
FAULTS = ("turns", "place", "room")
"""Names of the first pixels, which control the faults; see ``write_faulty_model``."""
BODY = json.dumps(
    {
        "inputs": [
            {
                "name": "pixel_values",
                "datatype": "FP32",
                "shape": [1, 3, 16, 16],
                "data": [0.25] * 768,
            }
        ]
    }
).encode()
"""A request with one image, in the protocol's JSON."""


def faulty_images(**faults: float) -> Any:
    """An image that triggers faults of the model; without any, it is answered at once.

    Args:
        faults: Values for names of ``FAULTS``.
    """
    image = np.zeros((1, 3, 16, 16), np.float32)
    for name, value in faults.items():
        image[0, 0, 0, FAULTS.index(name)] = value
    return image


def plain_images(seed: int, count: int = 1) -> Any:
    """Random images that trigger no fault."""
    images = np.random.default_rng(seed).normal(size=(count, 3, 16, 16)).astype(np.float32)
    images[:, 0, 0, : len(FAULTS)] = 0
    return images


def expected_logits(images: Any) -> Any:
    """The model's logits of images that trigger no fault."""
    return images.reshape(len(images), -1) @ WEIGHTS


def write_faulty_model(path: Path, metadata: dict[str, str], always: float = 0) -> Path:
    """Write a model that fails if an image says so.

    The first pixels of an image control: [0] additional iterations of a loop, in millions; [1] the
    index into a table with one row; [2] an allocation of this number times 10^14 floats, which is
    more than any address space.

    Args:
        path: The ONNX file.
        metadata: Metadata of the file.
        always: Iterations of the loop for every batch, in millions.
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
        "always": np.float32(always),
        "million": np.float32(1e6),
        "huge": np.float32(1e14),
        "table": np.zeros((1, 5), np.float32),
        "flat": np.array([-1, 768], np.int64),
        "single": np.array([1], np.int64),
        "nothing": np.float32(1e-30),
        "weights": WEIGHTS,
    }
    node = helper.make_node
    nodes = [
        node("Gather", ["pixel_values", "zero"], ["plane"], axis=1),
        node("Gather", ["plane", "zero"], ["row"], axis=1),
        node("Gather", ["row", "zero"], ["turns"], axis=1),
        node("Gather", ["row", "1st"], ["place"], axis=1),
        node("Gather", ["row", "2nd"], ["room"], axis=1),
        node("ReduceMax", ["turns"], ["most"], keepdims=0),
        node("Add", ["most", "always"], ["all"]),
        node("Mul", ["all", "million"], ["millions"]),
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
        "faulty",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, 16, 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 5])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return path


def metadata_of(artefact: Path) -> dict[str, str]:
    """Metadata of an exported file, without the digest, for use in another file."""
    metadata = onnx.load(artefact).metadata_props
    return {entry.key: entry.value for entry in metadata if entry.key != DIGEST}


def without_digest(proto: Any) -> bytes:
    """A model as bytes without the digest, so that changed content is accepted."""
    for entry in list(proto.metadata_props):
        if entry.key == DIGEST:
            proto.metadata_props.remove(entry)
    content: bytes = proto.SerializeToString()
    return content


class RawAnswer(NamedTuple):
    """Result of a raw connection.

    Attributes:
        content: All bytes from the server.
        sent: Number of bytes that the server accepted.
        ended: Whether the server closed the connection.
    """

    content: bytes
    sent: int
    ended: bool


def send_raw(served: Any, parts: Iterable[bytes], seconds: float = 5) -> RawAnswer:
    """Send bytes on a raw connection and receive until the server closes it or the time is up.

    Args:
        served: The server, with a ``port``.
        parts: What to send.
        seconds: Time limit of each send and receive.

    Raises:
        TimeoutError: The server neither reads nor closes the connection.
    """
    received, sent, ended = b"", 0, False
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        connection.settimeout(seconds)
        connection.connect(("127.0.0.1", served.port))
        try:
            for part in parts:
                connection.sendall(part)
                sent += len(part)
        except ConnectionError:
            ended = True
        try:
            while piece := connection.recv(65536):
                received += piece
            ended = True
        except ConnectionError:
            ended = True
        except TimeoutError:
            pass
    return RawAnswer(received, sent, ended)
