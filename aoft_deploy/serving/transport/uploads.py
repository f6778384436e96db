"""The files of a multipart form whose body is in memory."""

from __future__ import annotations

import re

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from aoft_deploy.serving.protocol.refusals import Refusal

__all__ = ["uploaded_files"]

MAX_HEADER = 4096
MAX_FIELDS = 64
"""Maximum number of parts that are not files."""


def uploaded_files(body: bytes, content_type: str, max_files: int) -> list[bytes]:
    """Contents of a form's files, in their order.

    A part is a file if it has a file name, or a content type that is not text. Other parts are
    fields, and are ignored, as is text before the first and after the last boundary (RFC 2046,
    5.1.1, and RFC 7578).

    Args:
        body: The form.
        content_type: The header ``Content-Type``, with the boundary.
        max_files: Maximum number of files.

    Raises:
        Refusal: The body is not a form, has no file or too many, or is truncated.
    """
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary or len(boundary) > 70:
        raise Refusal(400, "The multipart form names no boundary.")
    first = re.search(rb"(?:\A|\r\n)--%s[ \t]*\r\n" % re.escape(boundary), body)
    if first is None:
        raise Refusal(400, "The multipart form has no line with its boundary.")
    parts = _Parts(max_files)
    parser = MultipartParser(
        boundary,
        {
            "on_part_begin": parts.part_begin,
            "on_header_field": parts.header_field,
            "on_header_value": parts.header_value,
            "on_header_end": parts.header_end,
            "on_headers_finished": parts.headers_finished,
            "on_part_data": parts.part_data,
            "on_end": parts.end,
        },
    )
    try:
        parser.write(b"--%s\r\n" % boundary)  # the first boundary without trailing blanks
        parser.write(body[first.end() :])
        parser.finalize()
    except MultipartParseError as error:
        raise Refusal(400, "The multipart form is damaged.") from error
    if not parts.ended:
        raise Refusal(400, "The multipart form ends early.")
    if not parts.files:
        raise Refusal(400, "The multipart form has no file: give one with a filename.")
    return [bytes(content) for content in parts.files]


class _Parts:
    """Collects the events of the parser.

    Attributes:
        files: Contents of the parts that are files.
        ended: Whether the last boundary was read.
    """

    def __init__(self, max_files: int) -> None:
        self.max_files = max_files
        self.files: list[bytearray] = []
        self.fields = 0
        self.ended = False

    def part_begin(self) -> None:
        self.headers: dict[bytes, bytes] = {}
        self.name, self.value, self.size = b"", b"", 0

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._grow(end - start)
        self.name += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._grow(end - start)
        self.value += data[start:end]

    def header_end(self) -> None:
        self.headers[self.name.lower()] = self.value
        self.name = self.value = b""

    def headers_finished(self) -> None:
        self.is_file = _is_file(self.headers)
        if self.is_file:
            if len(self.files) == self.max_files:
                raise Refusal(413, f"The form has more than {self.max_files} files.")
            self.files.append(bytearray())
        else:
            self.fields += 1
            if self.fields > MAX_FIELDS:
                raise Refusal(413, f"The form has more than {MAX_FIELDS} fields beside its files.")

    def part_data(self, data: bytes, start: int, end: int) -> None:
        if self.is_file:
            self.files[-1] += memoryview(data)[start:end]

    def end(self) -> None:
        self.ended = True

    def _grow(self, size: int) -> None:
        self.size += size
        if self.size > MAX_HEADER:
            raise Refusal(400, "A part of the form has too long headers.")


def _is_file(headers: dict[bytes, bytes]) -> bool:
    _, options = parse_options_header(headers.get(b"content-disposition", b""))
    kind = headers.get(b"content-type", b"text/plain").strip().lower()
    return b"filename" in options or not kind.startswith(b"text/")
