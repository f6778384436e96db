"""Open a fleet's file as a graph that takes its tables as inputs, without parsing its weights.

The tables are some fields of the graph. They are left out of a copy of the file, and inputs are put
in their place. The copy is a file in memory, which the system fills with the weights: given bytes,
ONNX Runtime would copy them again before it parses them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.engine import FleetTables
from aoft_deploy.artefacts.protobuf import Part, block, fields, header, integer
from aoft_deploy.errors import ArtefactError
from aoft_exporters.graph.fleet_tables import FLEET_TABLES

__all__ = ["FleetFile", "fleet_file"]

GRAPH, INITIALIZER, INPUT = 7, 5, 11
"""Numbers of the fields of onnx.proto: a model's graph, and a graph's initialisers and inputs."""

DIMS, DATA_TYPE, NAME, RAW_DATA = 1, 2, 8, 9
"""Numbers of a tensor's fields."""

TYPES: dict[int, np.dtype[Any]] = {1: np.dtype(np.float32), 7: np.dtype(np.int64)}
"""Types of the tables, by their numbers in onnx.proto."""


class FleetFile(NamedTuple):
    """The content of a fleet's file.

    Attributes:
        graph: A file with the ONNX model that takes the tables as inputs; its bytes on systems
            without files in memory.
        tables: The tables of the tasks in the file.
    """

    graph: Path | bytes
    tables: FleetTables


@contextmanager
def fleet_file(path: Path) -> Iterator[FleetFile]:
    """Context manager: read a file that ``export_fleet`` wrote. At the end, ``graph`` is deleted.

    Raises:
        ArtefactError: The file cannot be read, is damaged, or is no fleet.
    """
    try:
        with path.open("rb") as file:
            pieces, tables = _divided(file.fileno())
            if set(tables) != set(FLEET_TABLES):
                raise ArtefactError(f"{path} is no fleet: export the checkpoints as a fleet first.")
            graph = _copied(file.fileno(), pieces)
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read ({error.strerror or error}).") from error
    except (ValueError, IndexError, KeyError, TypeError) as error:  # damaged bytes
        raise ArtefactError(f"{path} is no ONNX model ({error}).") from error
    if isinstance(graph, bytes):
        yield FleetFile(graph, FleetTables(**tables))
        return
    try:
        yield FleetFile(Path(f"/proc/self/fd/{graph}"), FleetTables(**tables))
    finally:
        os.close(graph)


def _divided(file: int) -> tuple[list[bytes | range], dict[str, NDArray[Any]]]:
    """The model that takes the tables as inputs, and the tables.

    Returns:
        The model in pieces: bytes, or places in the file.
    """
    model = Part(file, 0, os.fstat(file).st_size)
    graphs = [(value, stop) for number, value, stop in fields(model) if number == GRAPH]
    if len(graphs) != 1 or isinstance(graphs[0][0], int):
        raise ValueError(f"it has {len(graphs)} graphs")
    length, end = len(graphs[0][0]), graphs[0][1]
    start = kept = place = end - length
    pieces, tables = list[bytes | range](), dict[str, NDArray[Any]]()
    for number, value, stop in fields(Part(file, start, end)):
        name = _name(value) if number == INITIALIZER and not isinstance(value, int) else ""
        if name in FLEET_TABLES:
            tables[name] = _table(value)
            pieces.append(range(kept, place))
            kept = start + stop
        place = start + stop
    pieces.append(range(kept, end))
    pieces += [_input(name, tables[name]) for name in FLEET_TABLES if name in tables]
    before = range(start - len(header(GRAPH, length)))
    first = header(GRAPH, sum(map(len, pieces)))
    return [before, first, *pieces, range(end, len(model))], tables


def _copied(file: int, pieces: list[bytes | range]) -> int | bytes:
    """A file in memory of these pieces, as its descriptor; without such files, the bytes.

    Raises:
        ValueError: The file was truncated meanwhile.
    """
    if sys.platform != "linux":
        contents = (each if isinstance(each, bytes) else _read(file, each) for each in pieces)
        return b"".join(contents)
    copy = os.memfd_create("fleet")
    try:
        for piece in pieces:
            place = 0
            while place < len(piece):
                if isinstance(piece, bytes):
                    written = os.write(copy, piece[place:])
                else:
                    written = os.sendfile(copy, file, piece[place], len(piece) - place)
                if not written:
                    raise ValueError("truncated")
                place += written
    except BaseException:
        os.close(copy)
        raise
    return copy


def _read(file: int, place: range) -> bytes:
    return Part(file, place.start, place.stop).read()


def _name(tensor: Part | memoryview) -> str:
    """Name of a serialised tensor."""
    for number, value, _ in fields(tensor):
        if number == NAME and isinstance(value, memoryview):
            return str(value, "utf-8")
    return ""


def _table(tensor: Any) -> NDArray[Any]:
    """A serialised tensor as an array."""
    dims, kind, content = list[int](), 0, b""
    for number, value, _ in fields(tensor):
        if number == DIMS:
            dims.append(value)  # type: ignore[arg-type]
        elif number == DATA_TYPE:
            kind = value  # type: ignore[assignment]
        elif number == RAW_DATA and not isinstance(value, int):
            content = value.read() if isinstance(value, Part) else bytes(value)
    return np.frombuffer(content, TYPES[kind]).reshape(dims)


def _input(name: str, table: NDArray[Any]) -> bytes:
    """The serialised field of an input in place of a table; its first axis may have any length."""
    kind = next(number for number, dtype in TYPES.items() if dtype == table.dtype)
    axes = [block(2, FLEET_TABLES[name].encode()), *(integer(1, n) for n in table.shape[1:])]
    shape = b"".join(block(1, axis) for axis in axes)
    tensor = integer(1, kind) + block(2, shape)
    return block(INPUT, block(1, name.encode()) + block(2, block(1, tensor)))
