"""Read the metadata of an ONNX file, and check that it is complete and needs no other file.

An ONNX model can refer to other files of the host, or to memory addresses, for its weights.
aoft-export writes single files. Models that refer to anything else are refused before a runtime
opens them.

The last entry of the metadata is a digest of all bytes before it. It detects a file that is partly
overwritten by an unfinished copy: such a file has the size and structure of a model, but another
digest. Files of older versions have no such entry, and are opened without this check.

The digest of a large model takes about as long as a third of its opening. ``checking`` computes it
in other threads while a runtime opens the file.

Files are read with ``pread`` instead of a memory map: if a file is truncated meanwhile, the result
is an error instead of a crash.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from aoft_deploy.artefacts.protobuf import Part, block, fields
from aoft_deploy.errors import ArtefactError
from aoft_deploy.file_signatures import foreign
from aoft_deploy.path_kinds import missing
from aoft_deploy.processors import processors

__all__ = ["DIGEST", "checked_metadata", "checking", "digest_entry", "read_metadata", "seal"]

DIGEST = "sha256-4MiB"
"""Key of the last metadata entry: the SHA-256 of the SHA-256 digests of all 4 MiB chunks before it.
"""

CHUNK = 4 * 2**20
THREADS = min(8, processors())

# For each message type of onnx.proto, the fields that can contain tensors: number and message type.
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


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of an ONNX file, without reading its weights.

    Raises:
        ArtefactError: The file is missing, unreadable or damaged, or keeps weights in other files.
    """
    with _opened(path) as file:
        return _metadata(path, file)[0]


def checked_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of an ONNX file, and check the file against its digest if it has one.

    Raises:
        ArtefactError: As for ``read_metadata``, or the digest differs.
    """
    with _opened(path) as file:
        metadata, end = _metadata(path, file)
        _check_digest(path, file, metadata, end, THREADS)
    return metadata


@contextmanager
def checking(path: Path) -> Iterator[dict[str, str]]:
    """Context manager: as ``checked_metadata``, but the digest is computed during the block.

    The block opens the file in a runtime. What it opened must not be used before the block ended
    without an error. One processor is left to the block.

    Yields:
        The metadata.

    Raises:
        ArtefactError: As for ``checked_metadata``. If the digest differs, this error replaces the
            block's own, whose cause it is.
    """
    with _opened(path) as file, ThreadPoolExecutor(1) as pool:
        metadata, end = _metadata(path, file)
        checked = pool.submit(_check_digest, path, file, metadata, end, max(1, THREADS - 1))
        try:
            yield metadata
        finally:
            checked.result()


def seal(path: Path) -> None:
    """Append the metadata entry with the digest to a model's file, which must not have one yet.

    Raises:
        OSError: The file cannot be read or written.
    """
    with path.open("r+b") as file:
        length = file.seek(0, os.SEEK_END)
        file.write(digest_entry(_file_digest(file.fileno(), length, THREADS)))


def digest_entry(digest: str) -> bytes:
    """The serialised metadata entry of a digest in hexadecimal."""
    texts = DIGEST.encode(), digest.encode()
    return block(_METADATA, b"".join(block(i, text) for i, text in enumerate(texts, start=1)))


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Context manager: open a file.

    Raises:
        ArtefactError: It is missing or unreadable.
    """
    with _explained(path):
        if not path.is_file():  # opening a pipe without a writer would block
            raise FileNotFoundError
        file = path.open("rb")
    with file:
        yield file


def _metadata(path: Path, file: BinaryIO) -> tuple[dict[str, str], int | None]:
    """The metadata of a file, and the number of bytes that its digest covers; None without one.

    Raises:
        ArtefactError: As for ``read_metadata``.
    """
    metadata: dict[str, str] = {}
    with _explained(path):
        self_contained, end = _walk_file(file.fileno(), metadata)
    if not self_contained:
        raise ArtefactError(f"{path} keeps weights in other files: only single files are opened.")
    return metadata, end


def _check_digest(
    path: Path, file: BinaryIO, metadata: dict[str, str], end: int | None, threads: int
) -> None:
    """Compare a file with the digest in its metadata, if there is one.

    Raises:
        ArtefactError: They differ, or the file cannot be read.
    """
    if end is None:
        return
    with _explained(path):
        unchanged = _file_digest(file.fileno(), end, threads) == metadata[DIGEST]
    if not unchanged:
        raise ArtefactError(
            f"{path} is half overwritten, still being written, or was changed since aoft-export "
            "wrote it: copy or export it again."
        )


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Context manager: say in one sentence why a file cannot be read.

    Raises:
        ArtefactError: It is missing, unreadable or damaged.
    """
    try:
        yield
    except (ValueError, IndexError) as error:
        kind = foreign(path, "onnx")
        reason = f": it {kind}" if kind else ""
        raise ArtefactError(f"{path} is no ONNX model, or a damaged one{reason}.") from error
    except FileNotFoundError as error:
        raise ArtefactError(missing(path)) from error
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read ({error.strerror or error}).") from error


def _walk_file(file: int, metadata: dict[str, str]) -> tuple[bool, int | None]:
    """Collect the metadata of a file.

    Returns:
        Whether all weights are inside the file, and the number of bytes that the digest covers;
        None without a digest.
    """
    size = os.fstat(file).st_size
    if not size:
        raise ValueError("empty")
    message = Part(file, 0, size)
    self_contained, end, start = True, None, 0
    for number, value, stop in fields(message):
        if number in _INNER["model"] and not isinstance(value, int):
            known = DIGEST in metadata
            inside = _walk(value, _INNER["model"][number], metadata, 1)
            self_contained = inside and self_contained
            if DIGEST in metadata and not known:
                end = start
        start = stop
    if end is not None and end + len(digest_entry(64 * "0")) != size:
        end = size  # data follows the entry, so the comparison must fail
    return self_contained, end


def _file_digest(file: int, length: int, threads: int) -> str:
    """Digest of the first ``length`` bytes of a file, in hexadecimal.

    Args:
        file: Descriptor of the file.
        length: Number of bytes.
        threads: Number of threads. Each reads into one buffer, since new memory for each chunk
            takes longer than reading it.

    Raises:
        ValueError: There are fewer bytes.
    """
    starts = range(0, length, CHUNK)

    def chunk_digests(first: int) -> list[bytes]:
        buffer, digests = memoryview(bytearray(min(CHUNK, length))), list[bytes]()
        for start in starts[first::threads]:
            chunk = buffer[: min(CHUNK, length - start)]
            if os.preadv(file, [chunk], start) != len(chunk):
                raise ValueError("truncated")
            digests.append(hashlib.sha256(chunk).digest())
        return digests

    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(chunk_digests, range(threads)))
    ordered = (found[i % threads][i // threads] for i in range(len(starts)))
    return hashlib.sha256(b"".join(ordered)).hexdigest()


def _walk(message: Part | memoryview, kind: str, metadata: dict[str, str], depth: int) -> bool:
    """Collect the metadata of a message, and return whether all its tensors are in the file."""
    if depth > _DEPTH:
        raise ValueError("nested too deeply")
    inner = _INNER[kind]
    pair: dict[int, str] = {}
    for number, value, _ in fields(message):
        if kind == "tensor":
            if number == _EXTERNAL_DATA or (number == _DATA_LOCATION and value != 0):
                return False
        elif not isinstance(value, int):
            if kind == "entry":
                pair[number] = _text(value)
            elif number in inner and not _walk(value, inner[number], metadata, depth + 1):
                return False
    if kind == "entry":
        metadata[pair.get(1, "")] = pair.get(2, "")
    return True


def _text(value: Part | memoryview) -> str:
    return str(value if isinstance(value, memoryview) else value.read(), "utf-8")
