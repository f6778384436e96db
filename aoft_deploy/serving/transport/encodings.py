"""Compressed bodies: gzip and deflate, with a limit on the decompressed size."""

from __future__ import annotations

import gzip
import re
import zlib

from aoft_deploy.serving.protocol.refusals import Refusal
from aoft_deploy.texts import shortened

__all__ = ["acceptable", "compressed", "decompressed"]

WINDOWS = {
    "gzip": 16 + zlib.MAX_WBITS,
    "x-gzip": 16 + zlib.MAX_WBITS,
    "deflate": zlib.MAX_WBITS,
}
MIN_BYTES = 1024
"""Smaller bodies are not compressed."""

PART = 2**18
MAX_MEMBERS = 10_000
OFFERED = ("gzip", "deflate", "identity")
QUALITY = re.compile(r"q=(0(?:\.\d{0,3})?|1(?:\.0{0,3})?)")


def decompressed(body: bytes | memoryview, encoding: str, limit: int) -> bytes | memoryview:
    """Undo a ``Content-Encoding``. Several gzip members form one body.

    Raises:
        Refusal: 415 for an unknown encoding, 400 for a damaged body, 413 for more than ``limit``
            bytes or too many members.
    """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return body
    if name not in WINDOWS:
        raise Refusal(415, f"Content-Encoding is {shortened(encoding)}: use gzip or deflate.")
    parts, total, members = [], 0, 1
    decompressor = zlib.decompressobj(WINDOWS[name])
    data = memoryview(body)
    try:
        for start in range(0, len(data), PART):
            remaining: bytes | memoryview = data[start : start + PART]
            while remaining:
                if decompressor.eof:
                    if name == "deflate":
                        raise Refusal(400, "More bytes follow the end of the deflate body.")
                    remaining = bytes(remaining).lstrip(b"\0")  # gzip may be padded
                    if not remaining:
                        break
                    members += 1
                    if members > MAX_MEMBERS:
                        raise Refusal(413, f"The body has more than {MAX_MEMBERS} gzip members.")
                    decompressor = zlib.decompressobj(WINDOWS[name])
                part = decompressor.decompress(remaining, 2**20)
                total += len(part)
                if total > limit:
                    raise Refusal(413, f"The body decompresses to more than {limit} bytes.")
                parts.append(part)
                remaining = (
                    decompressor.unused_data if decompressor.eof else decompressor.unconsumed_tail
                )
    except zlib.error as error:
        raise Refusal(400, f"The body is not {name}.") from error
    if not decompressor.eof:
        raise Refusal(400, f"The {name} body is truncated.")
    return b"".join(parts)


def acceptable(accepted: str | None) -> list[str]:
    """Encodings that a client accepts, best first (RFC 9110, 12.5.3).

    Args:
        accepted: The header ``Accept-Encoding``; None if there is none.

    Returns:
        Some of gzip, deflate and identity; in this order if their qualities are equal.

    Raises:
        Refusal: 406: it accepts none of them.
    """
    if accepted is None or not accepted.strip():
        return ["identity"]  # RFC 9110 allows any encoding here, but few clients expect one
    asked: dict[str, float] = {}
    for entry in accepted.lower().split(","):
        name, *parameters = (part.strip() for part in entry.split(";"))
        quality = [QUALITY.fullmatch(p.replace(" ", "")) for p in parameters if p[:1] == "q"]
        if name and None not in quality:
            asked["gzip" if name == "x-gzip" else name] = (
                float(quality[0][1]) if quality and quality[0] else 1.0
            )
    others = asked.get("*")
    # An encoding that is not listed is not accepted, except identity: that comes last, unless it or
    # "*" is refused.
    qualities = {name: asked.get(name, others or 0.0) for name in OFFERED[:2]}
    qualities["identity"] = asked.get("identity", 1e-4 if others is None else others)
    found = sorted((name for name in OFFERED if qualities[name]), key=lambda n: -qualities[n])
    if not found:
        raise Refusal(
            406, f"Accept-Encoding is {shortened(accepted)}: give gzip, deflate or identity."
        )
    return found


def compressed(body: bytes, encodings: list[str]) -> tuple[bytes, str | None]:
    """Compress a body if it is large enough or must be compressed.

    Args:
        body: The body.
        encodings: Encodings that the client accepts, best first.

    Returns:
        The body, and its encoding; None if it is not compressed.
    """
    small = len(body) < MIN_BYTES and "identity" in encodings
    chosen = "identity" if small else encodings[0]
    if chosen == "gzip":
        return gzip.compress(body, 1, mtime=0), chosen
    if chosen == "deflate":
        return zlib.compress(body, 1), chosen
    return body, None
