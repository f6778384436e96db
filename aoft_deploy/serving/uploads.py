"""Files of a multipart form, from a body that is in memory already."""

from __future__ import annotations

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from aoft_deploy.serving.refusals import Refusal

__all__ = ["uploaded"]

MAX_HEADER = 4096


class _Parts:
    """What the parser tells, collected."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.contents: list[bytearray] = []
        self.headers = 0
        self.ended = False

    def part_begin(self) -> None:
        if len(self.contents) == self.most:
            raise Refusal(413, f"The form has more than {self.most} parts.")
        self.contents.append(bytearray())
        self.headers = 0

    def header(self, data: bytes, start: int, end: int) -> None:
        self.headers += end - start
        if self.headers > MAX_HEADER:
            raise Refusal(400, "A part of the form has too long headers.")

    def part_data(self, data: bytes, start: int, end: int) -> None:
        self.contents[-1] += memoryview(data)[start:end]

    def end(self) -> None:
        self.ended = True


def uploaded(body: bytes, content_type: str, most: int) -> list[bytes]:
    """Contents of all parts of a form, in their order; names are not looked at.

    Args:
        body: The form.
        content_type: Its header, with the boundary.
        most: Parts that are taken.

    Raises:
        Refusal: It is no form, has no or too many parts, or ends early.
    """
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary or len(boundary) > 70:
        raise Refusal(400, "The multipart form names no boundary.")
    parts = _Parts(most)
    parser = MultipartParser(
        boundary,
        {
            "on_part_begin": parts.part_begin,
            "on_header_field": parts.header,
            "on_header_value": parts.header,
            "on_part_data": parts.part_data,
            "on_end": parts.end,
        },
    )
    try:
        parser.write(body)
        parser.finalize()
    except MultipartParseError as error:
        raise Refusal(400, "The multipart form is damaged.") from error
    if not parts.ended or not parts.contents:
        raise Refusal(400, "The multipart form has no file, or ends early.")
    return [bytes(content) for content in parts.contents]
