"""A model that goes wrong as the pixels of its images say, and a raw connection to its server."""

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
SAYS = ("turns", "place", "room")
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
"""A request about one image, in the protocol's JSON."""


def asking(**said: float) -> Any:
    """An image for the model of ``made``; without a word it is answered at once."""
    image = np.zeros((1, 3, 16, 16), np.float32)
    for name, value in said.items():
        image[0, 0, 0, SAYS.index(name)] = value
    return image


def harmless(seed: int, count: int = 1) -> Any:
    """Random images that ask for nothing."""
    images = np.random.default_rng(seed).normal(size=(count, 3, 16, 16)).astype(np.float32)
    images[:, 0, 0, : len(SAYS)] = 0
    return images


def answered(images: Any) -> Any:
    """Logits that the model of ``made`` owes."""
    return images.reshape(len(images), -1) @ WEIGHTS


def made(path: Path, metadata: dict[str, str], always: float = 0) -> Path:
    """An artefact whose pixels say what goes wrong.

    Of each image the first pixel's row says: [0] how many times a loop turns, in millions, beside
    those that it ``always`` turns; [1] which row of a table of one row is looked up; [2] 10^14
    floats to allocate, if not 0: more than any machine's address space.
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
        "made",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, 16, 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 5])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return path


def metadata_of(artefact: Path) -> dict[str, str]:
    """What an exported file says of itself but its digest, for another file to say too."""
    metadata = onnx.load(artefact).metadata_props
    return {entry.key: entry.value for entry in metadata if entry.key != DIGEST}


def without_digest(proto: Any) -> bytes:
    """A model as bytes that aoft-export did not write, so that something may be changed in it."""
    for entry in list(proto.metadata_props):
        if entry.key == DIGEST:
            proto.metadata_props.remove(entry)
    content: bytes = proto.SerializeToString()
    return content


class Heard(NamedTuple):
    """What a connection came to.

    Attributes:
        content: All that the server sent.
        sent: Bytes that it let us send.
        ended: Whether it ended the connection.
    """

    content: bytes
    sent: int
    ended: bool


def raw(served: Any, parts: Iterable[bytes], seconds: float = 5) -> Heard:
    """Send bytes until the server ends the connection, and take what it sends until the time is up.

    A server that neither reads nor ends the connection is a ``TimeoutError``.
    """
    found, sent, ended = b"", 0, False
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
                found += piece
            ended = True
        except ConnectionError:
            ended = True
        except TimeoutError:
            pass
    return Heard(found, sent, ended)
