"""The digest of an ONNX file's graph, without the values of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from aoft_deploy.artefacts.protobuf import Part, fields

__all__ = ["graph_digest"]

GRAPH, METADATA, INITIALIZER, DATA_TYPE, RAW_DATA = 7, 14, 5, 2, 9
"""Numbers of the fields of onnx.proto: of a model, of its graph, and of an initialiser."""

FLOAT, FLOAT_BYTES = 1, 4
"""Number of the type float32 in onnx.proto, and its size."""


def graph_digest(path: Path) -> str:
    """SHA-256 of all of a model but its metadata and the values of its weights, in hexadecimal.

    Weights are float32 initialisers with more than one element. All other initialisers, such as
    shapes and scalars, are parts of the graph.

    Args:
        path: An ONNX file with its weights inside.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is damaged; or ``IndexError``.
    """
    digest = hashlib.sha256()

    def add(number: int, content: bytes) -> None:
        digest.update(f"{number}:{len(content)}:".encode() + content)

    with path.open("rb") as file:
        model = Part(file.fileno(), 0, path.stat().st_size)
        for number, value, _ in fields(model):
            if number == GRAPH and not isinstance(value, int):
                _add_graph(value, add)
            elif number != METADATA:
                add(number, _content(value))
    return digest.hexdigest()


def _add_graph(graph: Part | memoryview, add: Callable[[int, bytes], None]) -> None:
    for number, value, _ in fields(graph):
        if number != INITIALIZER or isinstance(value, int):
            add(number, _content(value))
            continue
        tensor = [(inner, content) for inner, content, _ in fields(value)]
        is_float = (DATA_TYPE, FLOAT) in tensor
        for inner, content in tensor:
            values = b"" if isinstance(content, int) or inner != RAW_DATA else content
            if is_float and len(values) > FLOAT_BYTES:
                add(inner, str(len(values)).encode())
            else:
                add(inner, _content(content))
        add(number, b"")


def _content(value: int | Part | memoryview) -> bytes:
    if isinstance(value, int):
        return str(value).encode()
    return bytes(value) if isinstance(value, memoryview) else value.read()
