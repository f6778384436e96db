"""Safetensors files with one fault each in the header of a valid file."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["FAULTS", "faulty"]

Header = dict[str, Any]

DAMAGED = "is no checkpoint"


def names(header: Header) -> list[str]:
    """Names of the tensors in the order of their data."""
    tensors = header.keys() - {"__metadata__"}
    return sorted(tensors, key=lambda name: int(header[name]["data_offsets"][0]))


def overlap(header: Header) -> None:
    header["update.more"] = dict(header[names(header)[0]])


def gap(header: Header) -> None:
    del header[names(header)[0]]


def overflow(header: Header) -> None:
    last = header[names(header)[-1]]
    last.update(shape=[2**62, 2**62], data_offsets=[last["data_offsets"][0], 2**64 - 4])


def beyond(header: Header) -> None:
    last = header[names(header)[-1]]
    start = last["data_offsets"][0]
    last.update(shape=[2**38], data_offsets=[start, start + 2**40])


def negative(header: Header) -> None:
    header[names(header)[0]]["data_offsets"][0] = -2


def negative_shape(header: Header) -> None:
    header[names(header)[0]]["shape"] = [-2]


def path(header: Header) -> None:
    header["../../etc/x"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def windows_path(header: Header) -> None:
    header["..\\x"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def many(header: Header) -> None:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header.update({f"t{i}": empty for i in range(20_000)})


def changed(change: Callable[[Header], object]) -> Callable[[bytes], bytes]:
    def make(text: bytes) -> bytes:
        header = json.loads(text)
        change(header)
        return json.dumps(header, separators=(",", ":")).encode()

    return make


def twice(text: bytes) -> bytes:
    """Repeat the first tensor's entry, with an escape sequence in its name."""
    name, entry = next((n, e) for n, e in json.loads(text).items() if n != "__metadata__")
    spelt = f"\\u{ord(name[0]):04x}{name[1:]}"
    return text.rstrip()[:-1] + f',"{spelt}":{json.dumps(entry)}}}'.encode()


def described_twice(text: bytes) -> bytes:
    return text.replace(b'{"__metadata__":{"aoft":', b'{"__metadata__":{"aoft":"{}","aoft":', 1)


FAULTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "header of 101 MB": (lambda text: text.ljust(101_000_000), DAMAGED),
    "header of 20 MB": (lambda text: text.ljust(20_000_000), "header would take 20000000 bytes"),
    "deep header": (lambda text: b'{"a":' * 100_000, DAMAGED),
    "no object": (lambda text: b"[" + text + b"]", DAMAGED),
    "no UTF-8": (lambda text: text.replace(b"a", b"\xff", 1), DAMAGED),
    "overlap": (changed(overlap), DAMAGED),
    "gap": (changed(gap), DAMAGED),
    "overflow": (changed(overflow), DAMAGED),
    "beyond the end": (changed(beyond), DAMAGED),
    "negative": (changed(negative), DAMAGED),
    "negative shape": (changed(negative_shape), DAMAGED),
    "twice": (twice, r"holds '[\w.]+' twice: it is not read"),
    "described twice": (described_twice, "holds 'aoft' twice: it is not read"),
    "path": (changed(path), "tensor '../../etc/x', which is a path and no name of a parameter"),
    "path of Windows": (changed(windows_path), r"tensor '..\\\\x', which is a path and no name"),
    "20,000 tensors": (changed(many), r"holds 200\d\d tensors, but at most 10000 are read"),
}
"""Function from a header to a faulty one, and the expected message, for each fault."""


def faulty(source: Path, target: Path, fault: str) -> Path:
    """Copy a safetensors file and introduce a fault of ``FAULTS``."""
    data = source.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    text = FAULTS[fault][0](data[8 : 8 + length])
    assert text != data[8 : 8 + length]
    target.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return target
