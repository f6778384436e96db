"""Compressed bodies: gzip and deflate, never more than a limit of bytes in memory."""

from __future__ import annotations

import gzip
import zlib

from aoft_deploy.serving.refusals import Refusal, shown

__all__ = ["compressed", "decompressed"]

WINDOWS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
SMALLEST = 1024
"""Bytes of a body that is worth compressing."""


def decompressed(body: bytes | memoryview, encoding: str, limit: int) -> bytes | memoryview:
    """A body as it was before its ``Content-Encoding``.

    Raises:
        Refusal: 415 for another encoding, 400 for a damaged body, 413 for more bytes than
            ``limit``.
    """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return body
    if name not in WINDOWS:
        raise Refusal(415, f"Content-Encoding is {shown(encoding)}: use gzip or deflate.")
    unpack = zlib.decompressobj(WINDOWS[name])
    rest: bytes | memoryview = body
    parts, total = [], 0
    try:
        while not unpack.eof and rest:
            part = unpack.decompress(rest, 2**20)
            total += len(part)
            if total > limit:
                raise Refusal(413, f"The body unpacks to more than {limit} bytes.")
            parts.append(part)
            rest = unpack.unconsumed_tail
    except zlib.error as error:
        raise Refusal(400, f"The body is not {name}.") from error
    if not unpack.eof or unpack.unused_data:
        raise Refusal(400, f"The {name} body is truncated, or something follows it.")
    return b"".join(parts)


def compressed(body: bytes, accepted: str) -> tuple[bytes, str | None]:
    """A body in an encoding that the client takes, if it gains; and that encoding."""
    names = [entry.partition(";")[0].strip() for entry in accepted.lower().split(",")]
    if len(body) >= SMALLEST and "gzip" in names:
        return gzip.compress(body, 1, mtime=0), "gzip"
    if len(body) >= SMALLEST and "deflate" in names:
        return zlib.compress(body, 1), "deflate"
    return body, None
