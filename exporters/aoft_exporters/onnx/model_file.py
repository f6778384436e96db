"""Write an ONNX model as one file, its weights straight from their arrays.

A protobuf library would hold the whole message in memory, and copy every weight three times: into
its tensor, into the message, and for ONNX's checker. Here the graph without weights is serialised
and checked, and each weight is written from its array. The bytes are those of the library.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.onnx_metadata import seal
from aoft_deploy.artefacts.protobuf import fields, header

__all__ = ["stored_bytes", "write_model"]

GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9
"""Numbers of the fields of onnx.proto: of a model's graph, its initialisers, and their values."""

CHECKED = 1024
"""Initialisers with more values are checked by type and shape alone."""


def write_model(proto: Any, weights: Mapping[str, NDArray[Any]], path: Path) -> None:
    """Check a model, write it as a file, and seal the file with its digest.

    Args:
        proto: An ONNX model; it is not changed.
        weights: Values of the initialisers that have none in ``proto``, by their names, in their
            shapes and types.
        path: File to write.

    Raises:
        ValueError: A weight has another size than its initialiser.
        onnx.checker.ValidationError: The model is not valid.
        OSError: The file cannot be written.
    """
    _check(proto)
    with path.open("wb") as file:
        for piece in _serialised(proto, weights):
            file.write(piece)
    seal(path)


def stored_bytes(proto: Any) -> int:
    """Total size of an ONNX model's initialisers, in bytes."""
    return sum(map(_size, proto.graph.initializer))


def _size(tensor: Any) -> int:
    """Size of an initialiser in bytes."""
    import onnx

    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return int(math.prod(tensor.dims) * kind.itemsize)


def _check(proto: Any) -> None:
    """Run ONNX's checker on the graph, with its large weights as inputs.

    Of a weight, the checker compares the number of bytes with type and shape, as ``_serialised``
    does. The nodes are checked as with the weights: against the operators of the opset, and for
    names that are used before they are computed, or computed twice.
    """
    import onnx

    light = _without(proto, "graph")
    light.graph.CopyFrom(_without(proto.graph, "initializer"))
    inputs = {value.name for value in proto.graph.input}
    for tensor in proto.graph.initializer:
        if math.prod(tensor.dims) <= CHECKED and tensor.HasField("raw_data"):
            light.graph.initializer.append(tensor)
        elif tensor.name not in inputs:
            kind = tensor.data_type, list(tensor.dims)
            light.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, *kind))
    onnx.checker.check_model(light)


def _serialised(proto: Any, weights: Mapping[str, NDArray[Any]]) -> Iterator[bytes | memoryview]:
    """The model's bytes in the order of protobuf: each message's fields by their numbers."""
    heads, lengths = [], []
    for tensor in proto.graph.initializer:
        before, after = _around(tensor.SerializeToString(), RAW_DATA)
        length = 0
        if tensor.name in weights:
            length = weights[tensor.name].nbytes
            if length != _size(tensor) or tensor.HasField("raw_data"):
                raise ValueError(f"{tensor.name} has another size than its weight.")
            before += header(RAW_DATA, length)
        heads.append((before, after))
        lengths.append(len(before) + length + len(after))
    first, last = _around(_without(proto.graph, "initializer").SerializeToString(), INITIALIZER)
    total = len(first) + len(last)
    total += sum(len(header(INITIALIZER, length)) + length for length in lengths)
    start, end = _around(_without(proto, "graph").SerializeToString(), GRAPH)
    yield start + header(GRAPH, total) + first
    for tensor, (before, after), length in zip(
        proto.graph.initializer, heads, lengths, strict=True
    ):
        yield header(INITIALIZER, length) + before
        if tensor.name in weights:
            yield np.ascontiguousarray(weights[tensor.name]).reshape(-1).view(np.uint8).data
        yield after
    yield last + end


def _without(message: Any, name: str) -> Any:
    """A copy of a message without a field, which is not copied on the way."""
    copied = type(message)()
    for field, value in message.ListFields():
        if field.name == name:
            continue
        if field.is_repeated:
            getattr(copied, field.name).extend(value)
        elif field.message_type is not None:
            getattr(copied, field.name).CopyFrom(value)
        else:
            setattr(copied, field.name, value)
    return copied


def _around(message: bytes, number: int) -> tuple[bytes, bytes]:
    """The fields of a serialised message before the place of a field, and those after it.

    The field itself may be there: it belongs to the first part.
    """
    place = 0
    for found, _, end in fields(memoryview(message)):
        if found > number:
            break
        place = end
    return message[:place], message[place:]
