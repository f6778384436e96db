"""Compressed bodies: gzip and deflate, never more than a limit of bytes in memory."""

from __future__ import annotations

import gzip
import re
import zlib

from aoft_deploy.serving.protocol.refusals import Refusal, shown

__all__ = ["acceptable", "compressed", "decompressed"]

WINDOWS = {
    "gzip": 16 + zlib.MAX_WBITS,
    "x-gzip": 16 + zlib.MAX_WBITS,
    "deflate": zlib.MAX_WBITS,
}
SMALLEST = 1024
"""Bytes of a body that is worth compressing."""

PART = 2**18
MOST_MEMBERS = 10_000
OFFERED = ("gzip", "deflate", "identity")
QUALITY = re.compile(r"q=(0(?:\.\d{0,3})?|1(?:\.0{0,3})?)")


def decompressed(body: bytes | memoryview, encoding: str, limit: int) -> bytes | memoryview:
    """A body as it was before its ``Content-Encoding``. Several gzip members are one body.

    Raises:
        Refusal: 415 for another encoding, 400 for a damaged body, 413 for more bytes than
            ``limit``, or too many members.
    """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return body
    if name not in WINDOWS:
        raise Refusal(415, f"Content-Encoding is {shown(encoding)}: use gzip or deflate.")
    found, total, members = [], 0, 1
    unpack = zlib.decompressobj(WINDOWS[name])
    whole = memoryview(body)
    try:
        for start in range(0, len(whole), PART):
            rest: bytes | memoryview = whole[start : start + PART]
            while rest:
                if unpack.eof:
                    if name == "deflate":
                        raise Refusal(400, "Something follows the deflate body.")
                    rest = bytes(rest).lstrip(b"\0")  # gzip may be padded
                    if not rest:
                        break
                    members += 1
                    if members > MOST_MEMBERS:
                        raise Refusal(413, f"The body has more than {MOST_MEMBERS} gzip members.")
                    unpack = zlib.decompressobj(WINDOWS[name])
                part = unpack.decompress(rest, 2**20)
                total += len(part)
                if total > limit:
                    raise Refusal(413, f"The body unpacks to more than {limit} bytes.")
                found.append(part)
                rest = unpack.unused_data if unpack.eof else unpack.unconsumed_tail
    except zlib.error as error:
        raise Refusal(400, f"The body is not {name}.") from error
    if not unpack.eof:
        raise Refusal(400, f"The {name} body is truncated.")
    return b"".join(found)


def acceptable(accepted: str | None) -> list[str]:
    """Encodings that a client takes, the one it likes best first (RFC 9110, 12.5.3).

    Args:
        accepted: The header ``Accept-Encoding``; None where there is none.

    Returns:
        Of gzip, deflate and identity; among equals in this order.

    Raises:
        Refusal: 406: none of them.
    """
    if accepted is None or not accepted.strip():
        return ["identity"]  # without a header any could be meant, but few clients know it
    asked: dict[str, float] = {}
    for entry in accepted.lower().split(","):
        name, *parameters = (part.strip() for part in entry.split(";"))
        quality = [QUALITY.fullmatch(p.replace(" ", "")) for p in parameters if p[:1] == "q"]
        if name and None not in quality:
            asked["gzip" if name == "x-gzip" else name] = (
                float(quality[0][1]) if quality and quality[0] else 1.0
            )
    others = asked.get("*")
    # What is not named is not taken, but identity is: last, unless it or all others are refused.
    qualities = {name: asked.get(name, others or 0.0) for name in OFFERED[:2]}
    qualities["identity"] = asked.get("identity", 1e-4 if others is None else others)
    taken = sorted((name for name in OFFERED if qualities[name]), key=lambda n: -qualities[n])
    if not taken:
        raise Refusal(406, f"Accept-Encoding is {shown(accepted)}: take gzip, deflate or identity.")
    return taken


def compressed(body: bytes, encodings: list[str]) -> tuple[bytes, str | None]:
    """A body in the first of some encodings, if it gains; and that encoding.

    Args:
        body: To compress.
        encodings: Of :func:`acceptable`.
    """
    small = len(body) < SMALLEST and "identity" in encodings
    chosen = "identity" if small else encodings[0]
    if chosen == "gzip":
        return gzip.compress(body, 1, mtime=0), chosen
    if chosen == "deflate":
        return zlib.compress(body, 1), chosen
    return body, None
