"""What an ONNX file says of itself: metadata, that it is a single file, and that it is whole.

A model may name other files of the host, or places in memory, as its weights. aoft-export writes
single files, and others are refused before any runtime opens them.

The last entry of the metadata is a digest of all bytes before it. A file that is half overwritten,
by a copy that is under way or was interrupted, has the length and the form of a model, but not the
digest. Files from before this entry existed have none, and are opened as they are.

Files are read with ``pread``, not mapped: one that is truncated meanwhile is an error and not the
end of the process.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from aoft_deploy.errors import ArtefactError
from aoft_deploy.file_signatures import foreign
from aoft_deploy.processors import processors

__all__ = ["DIGEST", "checked_metadata", "digest_entry", "read_metadata"]

DIGEST = "sha256-4MiB"
"""Key of the metadata's last entry: the SHA-256 of the SHA-256s of each 4 MiB before it."""

CHUNK = 4 * 2**20
THREADS = min(8, processors())

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
_METADATA = 14
_DEPTH = 32
_SMALL = 65536
"""Bytes of a message up to which it is read at once, and of the pieces of a larger one."""


def read_metadata(path: Path) -> dict[str, str]:
    """Metadata of an ONNX file, read without its weights.

    Raises:
        ArtefactError: It is missing, cannot be read, is damaged, or keeps weights in other files.
    """
    return _read(path, whole=False)


def checked_metadata(path: Path) -> dict[str, str]:
    """Metadata of an ONNX file whose bytes are those that were written, if it says which.

    Raises:
        ArtefactError: As ``read_metadata``; or it is half overwritten, or was changed.
    """
    return _read(path, whole=True)


def digest_entry(content: bytes) -> bytes:
    """What is appended to a serialised model, so that the file proves itself whole."""
    key, value = DIGEST.encode(), _digest(lambda n, at: content[at : at + n], len(content)).encode()
    entry = b"".join([b"\x0a", bytes([len(key)]), key, b"\x12", bytes([len(value)]), value])
    return bytes([_METADATA << 3 | 2, len(entry)]) + entry


def _read(path: Path, *, whole: bool) -> dict[str, str]:
    found: dict[str, str] = {}
    try:
        if not path.is_file():  # a pipe, which nobody may ever write to, is not opened
            raise FileNotFoundError
        with path.open("rb") as file:
            alone, end = _walk_file(file.fileno(), found)
            right = not whole or end is None or _file_digest(file.fileno(), end) == found[DIGEST]
    except (ValueError, IndexError) as error:
        told = foreign(path, "onnx")
        why = f": it {told}" if told else ""
        raise ArtefactError(f"{path} is no ONNX model, or a damaged one{why}.") from error
    except FileNotFoundError as error:
        raise ArtefactError(f"There is no file {path}.") from error
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read ({error.strerror or error}).") from error
    if not alone:
        raise ArtefactError(f"{path} keeps weights in other files: only single files are opened.")
    if not right:
        raise ArtefactError(
            f"{path} is half overwritten, still being written, or was changed since aoft-export "
            "wrote it: copy or export it again."
        )
    return found


def _walk_file(file: int, found: dict[str, str]) -> tuple[bool, int | None]:
    """Whether no weight lies outside, and how many bytes the digest is of; None without one."""
    size = os.fstat(file).st_size
    if not size:
        raise ValueError("empty")
    message = _Part(file, 0, size)
    alone, end, start = True, None, 0
    for number, value, stop in _fields(message):
        if number in _INNER["model"] and not isinstance(value, int):
            known = DIGEST in found
            alone = _walk(value, _INNER["model"][number], found, 1) and alone
            if DIGEST in found and not known:
                end = start
        start = stop
    if end is not None and end + len(digest_entry(b"")) != size:
        end = size  # something follows the entry: no digest is of that
    return alone, end


def _file_digest(file: int, length: int) -> str:
    return _digest(lambda n, at: os.pread(file, n, at), length)


def _digest(read: Callable[[int, int], bytes], length: int) -> str:
    """Digest of so many bytes, in hexadecimal.

    Args:
        read: From a number of bytes and where they begin to the bytes.
        length: How many.

    Raises:
        ValueError: There are fewer.
    """

    def one(start: int) -> bytes:
        size = min(CHUNK, length - start)
        piece = read(size, start)
        if len(piece) != size:
            raise ValueError("truncated")
        return hashlib.sha256(piece).digest()

    with ThreadPoolExecutor(THREADS) as pool:
        return hashlib.sha256(b"".join(pool.map(one, range(0, length, CHUNK)))).hexdigest()


class _Part:
    """A stretch of a file, like a memoryview, of which only what is looked at is read."""

    def __init__(self, file: int, start: int, stop: int) -> None:
        self._file, self._start, self._stop = file, start, stop
        self._piece, self._place = b"", 0

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, place: int) -> int:
        if place >= len(self):
            raise IndexError(place)
        if not self._place <= place < self._place + len(self._piece):
            self._piece = os.pread(self._file, _SMALL, self._start + place)
            self._place = place
        return self._piece[place - self._place]

    def read(self) -> bytes:
        """All of it."""
        piece = os.pread(self._file, len(self), self._start)
        if len(piece) != len(self):
            raise ValueError("truncated")
        return piece

    def part(self, start: int, stop: int) -> _Part | memoryview:
        """The bytes between two places; small ones are read."""
        start, stop = self._start + start, min(self._start + stop, self._stop)
        if stop - start > _SMALL:
            return _Part(self._file, start, stop)
        piece = os.pread(self._file, max(stop - start, 0), start)
        if len(piece) != max(stop - start, 0):
            raise ValueError("truncated")
        return memoryview(piece)


def _walk(message: _Part | memoryview, kind: str, found: dict[str, str], depth: int) -> bool:
    """Whether no tensor below lies outside; fills in the metadata."""
    if depth > _DEPTH:
        raise ValueError("nested too deeply")
    inner = _INNER[kind]
    pair: dict[int, str] = {}
    for number, value, _ in _fields(message):
        if kind == "tensor":
            if number == _EXTERNAL_DATA or (number == _DATA_LOCATION and value != 0):
                return False
        elif not isinstance(value, int):
            if kind == "entry":
                pair[number] = _text(value)
            elif number in inner and not _walk(value, inner[number], found, depth + 1):
                return False
    if kind == "entry":
        found[pair.get(1, "")] = pair.get(2, "")
    return True


def _text(value: _Part | memoryview) -> str:
    return str(value if isinstance(value, memoryview) else value.read(), "utf-8")


def _fields(message: _Part | memoryview) -> Iterator[tuple[int, int | _Part | memoryview, int]]:
    """Numbers, values and ends of a message's fields; those of fixed width are passed over."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, place = _varint(message, place)
            yield number, value, place
        elif wire in (1, 5):
            place += 8 if wire == 1 else 4
        elif wire == 2:
            length, place = _varint(message, place)
            stop = place + length
            inner = message.part(place, stop) if isinstance(message, _Part) else message[place:stop]
            yield number, inner, stop
            place = stop
        else:
            raise ValueError(f"wire type {wire}")
    if place != len(message):
        raise ValueError("truncated")


def _varint(message: _Part | memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("a number of more than ten bytes")
