"""Many tasks packed into one file, which opens fast and is read one task at a time.

    magic
    for each task: its row, its classifier (float32, little-endian), its classes (JSON: their names,
        or an object with ``names`` and ``activation`` if that is no softmax)
    index: length and text of the kind (JSON), number of tasks, entries (``ENTRY``), names
    start of the index, CRC-32 of the index, magic

Tasks are read with ``preadv`` instead of mapped: a missing or unreadable part is then an exception
instead of a signal that ends the process, and only the fleet's budget accounts for the memory.
"""

from __future__ import annotations

import json
import os
import struct
import weakref
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from aoft_deploy.classes import Classes
from aoft_deploy.errors import CheckpointError, OutputError, UnknownNameError
from aoft_deploy.file_signatures import foreign
from aoft_deploy.files import replacing
from aoft_deploy.fleet.name_index import NameIndex
from aoft_deploy.fleet.task import TaskKind, TaskParameters

if TYPE_CHECKING:
    from aoft_deploy.fleet.store import TaskStore

__all__ = ["PackedTasks", "pack"]

MAGIC = b"AOFTASK1"
TRAILER = struct.Struct("<QI8s")
ENTRY = np.dtype(
    [("name_end", "<i8"), ("start", "<u8"), ("classes", "<u4"), ("text", "<u4"), ("crc", "<u4")]
)
"""Index entry of a task.

The end of its name, the start of its data, the number of its classes, the length of their JSON,
and the CRC-32 of the data.
"""

UNREADABLE = (OSError, KeyError, TypeError, ValueError, OverflowError, RecursionError, struct.error)
"""Exceptions that a malformed index raises."""


class PackedTasks:
    """The tasks of a file that ``pack`` wrote.

    The index is in memory: about 30 bytes and the name for each task. If ``pack`` replaces the
    file, objects that opened it before keep the old content.

    Attributes:
        path: The file.
        kind: The kind of its tasks.
        names: Names of its tasks.

    Args:
        path: As the attribute.
        kind: The kind that the tasks must have; None accepts any.

    Raises:
        CheckpointError: The file is missing, truncated, damaged, of another format or kind.
    """

    def __init__(self, path: Path, kind: TaskKind | None = None) -> None:
        self.path = Path(path)
        try:
            self._file = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be opened ({error.strerror}).") from error
        weakref.finalize(self, os.close, self._file)
        try:
            self._read_index()
        except UNREADABLE as error:
            other_format = foreign(self.path, "packed")
            raise CheckpointError(
                f"{path} is no file of packed tasks, or a truncated one "
                f"({f'it {other_format}' if other_format else error})."
            ) from error
        if kind is not None:
            kind.check_kind(self.path, self.kind)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def read(self, name: str) -> TaskParameters:
        """Read a task's parameters.

        Raises:
            UnknownNameError: There is no such task.
            CheckpointError: The file was damaged after it was opened.
        """
        place = self.names.find(name)
        if place is None:
            raise UnknownNameError("task", name, self.names.closest(name))
        entry = self._entries[place]
        row_length, classes, width = (
            self.kind.row_length,
            int(entry["classes"]),
            self.kind.width + 1,
        )
        start, text = int(entry["start"]), int(entry["text"])
        size = 4 * (row_length + classes * width) + text
        damaged = CheckpointError(f"Task {name!r} in {self.path} is damaged: pack the file again.")
        if start + size > self._end:
            raise damaged
        data = np.empty(size, np.uint8)
        try:
            length = os.preadv(self._file, [data.data], start)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read ({error.strerror}).") from error
        if length != size or zlib.crc32(data.data) != entry["crc"]:
            raise damaged
        floats = data[: size - text].view("<f4")
        try:
            described = json.loads(data[size - text :].tobytes())
            if isinstance(described, list):
                described = {"names": described}
            names = Classes(map(str, described["names"]), described.get("activation"))
        except (*UNREADABLE, UnknownNameError) as error:
            raise damaged from error
        row, head = floats[:row_length], floats[row_length:].reshape(classes, width)
        return TaskParameters(row, head, names)

    def _read_index(self) -> None:
        size = os.fstat(self._file).st_size
        trailer = os.pread(self._file, TRAILER.size, max(size - TRAILER.size, 0))
        start, crc, magic = TRAILER.unpack(trailer)
        if magic != MAGIC or start > size:
            raise ValueError("its end is missing")
        self._end = start
        index = os.pread(self._file, max(size - TRAILER.size - start, 0), start)
        if zlib.crc32(index) != crc:
            raise ValueError("its index is damaged")
        (length,) = struct.unpack_from("<Q", index)
        self.kind = TaskKind.from_dict(json.loads(index[8 : 8 + length]))
        (count,) = struct.unpack_from("<Q", index, 8 + length)
        self._entries = np.frombuffer(index, ENTRY, count, 16 + length)
        text = index[16 + length + self._entries.nbytes :]
        ends = self._entries["name_end"].astype(np.int64)
        if (np.diff(ends, prepend=0, append=len(text)) < 0).any():
            raise ValueError("its names do not fit")
        self.names = NameIndex(text, ends)


def pack(source: TaskStore, path: Path) -> None:
    """Write all tasks of a store into one file, atomically.

    Args:
        source: The tasks, such as ``CheckpointFolder(folder, fleet.kind)``.
        path: File to write; it may be the one that ``source`` reads.

    Raises:
        CheckpointError: There are no tasks, or one cannot be read, has a wrong shape, or has
            parameters that are not finite.
        SettingError: Two tasks have the same name.
        OutputError: The file cannot be written.
    """
    names, kind = source.names, source.kind
    if not len(names):
        raise CheckpointError(f"There are no tasks to pack into {path}.")
    entries = np.zeros(len(names), ENTRY)
    entries["name_end"] = names.ends
    with replacing(Path(path)) as temporary:
        try:
            with temporary.open("wb") as file:
                file.write(MAGIC)
                for place, name in enumerate(names):
                    task = source.read(name)
                    kind.check_parameters(name, task)
                    classes = Classes(task.classes)
                    described = {"names": classes, "activation": classes.activation}
                    plain = classes.activation == "softmax"
                    text = json.dumps(classes if plain else described).encode()
                    data = b"".join(
                        [
                            task.row.astype("<f4", copy=False).data,
                            task.head.astype("<f4", copy=False).data,
                            text,
                        ]
                    )
                    entry = file.tell(), len(task.head), len(text), zlib.crc32(data)
                    entries[place] = (names.ends[place], *entry)
                    file.write(data)
                index = _index(kind, entries, names.text)
                file.write(index + TRAILER.pack(file.tell(), zlib.crc32(index), MAGIC))
        except OSError as error:
            raise OutputError(f"Cannot write {path}: {error.strerror or error}.") from error


def _index(
    kind: TaskKind, entries: np.ndarray[tuple[int], np.dtype[np.void]], text: bytes
) -> bytes:
    description = json.dumps(kind.to_dict()).encode()
    length, count = struct.pack("<Q", len(description)), struct.pack("<Q", len(entries))
    return b"".join([length, description, count, entries.tobytes(), text])
