"""What an ONNX file says of itself, read without its weights: metadata, and whether it is whole.

A model may name other files of the host, or places in memory, as its weights. aoft-export writes
single files, and others are refused before any runtime opens them.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from aoft_deploy.errors import CheckpointError
from aoft_deploy.first_bytes import foreign

__all__ = ["read_metadata"]

# Message types of onnx.proto that lead to tensors, and the numbers of the fields that do.
_INNER = {
    "model": {7: "graph", 14: "entry", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
    "entry": {},
}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14
_DEPTH = 32


def read_metadata(path: Path) -> dict[str, str]:
    """Metadata of an ONNX file.

    Raises:
        CheckpointError: It is missing, damaged, or keeps weights in other files.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}.")
    found: dict[str, str] = {}
    try:
        with path.open("rb") as file:  # the mapping goes with the last look at it
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        whole = _walk(view, "model", found, 0)
    except (ValueError, IndexError, OSError) as error:
        told = foreign(path, "onnx")
        why = f": it {told}" if told else ""
        raise CheckpointError(f"{path} is no ONNX model, or a damaged one{why}.") from error
    if not whole:
        raise CheckpointError(f"{path} keeps weights in other files: only single files are opened.")
    return found


def _walk(message: memoryview, kind: str, found: dict[str, str], depth: int) -> bool:
    """Whether no tensor below lies outside; fills in the metadata."""
    if depth > _DEPTH:
        raise ValueError("nested too deeply")
    inner = _INNER[kind]
    pair: dict[int, str] = {}
    for number, value in _fields(message):
        if kind == "tensor":
            if number == _EXTERNAL_DATA or (number == _DATA_LOCATION and value != 0):
                return False
        elif isinstance(value, memoryview):
            if kind == "entry":
                pair[number] = str(value, "utf-8")
            elif number in inner and not _walk(value, inner[number], found, depth + 1):
                return False
    if kind == "entry":
        found[pair.get(1, "")] = pair.get(2, "")
    return True


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Numbers and values of a message's fields; those of fixed width are passed over."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, place = _varint(message, place)
            yield number, value
        elif wire in (1, 5):
            place += 8 if wire == 1 else 4
        elif wire == 2:
            length, place = _varint(message, place)
            yield number, message[place : place + length]
            place += length
        else:
            raise ValueError(f"wire type {wire}")
    if place != len(message):
        raise ValueError("truncated")


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("a number of more than ten bytes")
