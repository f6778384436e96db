"""The wire format of protobuf messages, such as ONNX models: their fields, without a library.

A message is a memoryview, or a ``Part`` of a file, which is read on access: large fields stay on
disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

__all__ = ["Part", "block", "fields", "header", "integer"]

_SMALL = 65536
"""Messages up to this size in bytes are read at once; larger ones in pieces of this size."""


def header(number: int, length: int) -> bytes:
    """What comes before the content of a field of variable length, such as a message or a text.

    Args:
        number: Number of the field.
        length: Length of the content in bytes.
    """
    return _encoded(number << 3 | 2) + _encoded(length)


def block(number: int, content: bytes) -> bytes:
    """A serialised field of variable length, such as a message or a text."""
    return header(number, len(content)) + content


def integer(number: int, value: int) -> bytes:
    """A serialised field that is a whole number from 0."""
    return _encoded(number << 3) + _encoded(value)


class Part:
    """A range of bytes of a file, with the interface of a memoryview, read on access.

    Args:
        file: Descriptor of the file.
        start: First byte.
        stop: Byte after the last one.
    """

    def __init__(self, file: int, start: int, stop: int) -> None:
        self._file, self._start, self._stop = file, start, stop
        self._buffer, self._buffer_start = b"", 0

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, index: int) -> int:
        if index >= len(self):
            raise IndexError(index)
        if not self._buffer_start <= index < self._buffer_start + len(self._buffer):
            self._buffer = os.pread(self._file, _SMALL, self._start + index)
            self._buffer_start = index
        return self._buffer[index - self._buffer_start]

    def read(self) -> bytes:
        """All bytes of the range."""
        content = os.pread(self._file, len(self), self._start)
        if len(content) != len(self):
            raise ValueError("truncated")
        return content

    def part(self, start: int, stop: int) -> Part | memoryview:
        """The bytes from ``start`` to ``stop``. Small ranges are read at once."""
        first, last = start - self._buffer_start, min(stop, len(self)) - self._buffer_start
        if 0 <= first <= last <= len(self._buffer):
            return memoryview(self._buffer)[first:last]
        start, stop = self._start + start, min(self._start + stop, self._stop)
        if stop - start > _SMALL:
            return Part(self._file, start, stop)
        content = os.pread(self._file, max(stop - start, 0), start)
        if len(content) != max(stop - start, 0):
            raise ValueError("truncated")
        return memoryview(content)


def fields(message: Part | memoryview) -> Iterator[tuple[int, int | Part | memoryview, int]]:
    """Number, value and end of each field of a message, without fields of fixed width.

    Args:
        message: The message.

    Yields:
        The field's number; its value, an integer or its bytes; and the offset of the next field.

    Raises:
        IndexError: The message ends too early.
        ValueError: The message is damaged.
    """
    offset = 0
    while offset < len(message):
        key, offset = _varint(message, offset)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, offset = _varint(message, offset)
            yield number, value, offset
        elif wire in (1, 5):
            offset += 8 if wire == 1 else 4
        elif wire == 2:
            length, start = _varint(message, offset)
            offset = start + length
            if isinstance(message, Part):
                yield number, message.part(start, offset), offset
            else:
                yield number, message[start:offset], offset
        else:
            raise ValueError(f"wire type {wire}")
    if offset != len(message):
        raise ValueError("truncated")


def _varint(message: Part | memoryview, offset: int) -> tuple[int, int]:
    """Value of a variable-length integer, and the offset after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = message[offset]
        offset += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, offset
    raise ValueError("an integer of more than ten bytes")


def _encoded(value: int) -> bytes:
    """A variable-length integer."""
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])
