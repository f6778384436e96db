"""Decompression bombs: small files of large pictures, texts or profiles, and the cost to read."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    check = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)


def png(
    width: int, height: int, rows: bytes, *extra: bytes, depth: int = 1, kind: int = 0
) -> bytes:
    """A PNG of compressed rows, with further chunks before them."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    parts = [b"\x89PNG\r\n\x1a\n", head, *extra, chunk(b"IDAT", rows), chunk(b"IEND", b"")]
    return b"".join(parts)


@cache
def zeros(size: int) -> bytes:
    """Compressed zeros."""
    pack, piece = zlib.compressobj(9), bytes(2**20)
    parts = [pack.compress(piece[: min(2**20, size - i)]) for i in range(0, size, 2**20)]
    return b"".join(parts) + pack.flush()


def flat(width: int, height: int) -> bytes:
    """A black PNG with one bit per pixel; the largest ones lack some of their rows."""
    return png(width, height, zeros(min((width + 7) // 8 + 1, 4096) * min(height, 16384)))


def jpeg(width: int, height: int) -> bytes:
    """A JPEG with this size in its header."""
    stream = io.BytesIO()
    Image.new("RGB", (16, 8)).save(stream, "JPEG")
    return stream.getvalue().replace(
        b"\x08" + struct.pack(">HH", 8, 16), b"\x08" + struct.pack(">HH", height, width)
    )


def webp(width: int, height: int) -> bytes:
    """A lossless WebP with this size in its header."""
    stream = io.BytesIO()
    Image.new("RGB", (16, 16)).save(stream, "WEBP", lossless=True)
    data = bytearray(stream.getvalue())
    place = data.index(b"VP8L") + 9
    old = int.from_bytes(data[place : place + 4], "little")
    data[place : place + 4] = (old >> 28 << 28 | height - 1 << 14 | width - 1).to_bytes(4, "little")
    return bytes(data)


def packed_beside(kind: bytes) -> bytes:
    """A small PNG with a chunk of 200 MB of text or colour profile."""
    return png(8, 8, zlib.compress(bytes(16)), chunk(kind, b"name\0\0" + zeros(200 * 10**6)))


LARGE: dict[str, Callable[[], bytes]] = {
    "PNG of 13304 x 13304": partial(flat, 13304, 13304),
    "PNG of 65535 x 65535": partial(flat, 65535, 65535),
    "PNG of 2^31 - 1": partial(flat, 2**31 - 1, 2**31 - 1),
    "PNG of 2^31": partial(flat, 2**31, 2**31),
    "PNG of 2^32 - 1": partial(flat, 2**32 - 1, 2**32 - 1),
    "JPEG of 65500 x 65500": partial(jpeg, 65500, 65500),
    "WebP of 16384 x 16384": partial(webp, 16384, 16384),
}
"""Pictures with too many pixels."""

BESIDE: dict[str, Callable[[], bytes]] = {
    f"200 MB of {kind.decode()}": partial(packed_beside, kind) for kind in (b"zTXt", b"iCCP")
}
"""Small pictures with large chunks of other data."""


class Cost(NamedTuple):
    """Result and cost of reading a picture.

    Attributes:
        status: HTTP status of the refusal; 200 if the picture was read.
        message: Message of the refusal.
        seconds: CPU time.
        memory: Peak of additional memory in bytes.
    """

    status: int
    message: str
    seconds: float
    memory: int


READER = """
import json, os, sys, time
from pathlib import Path
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.serving.endpoints.images import decode_sample
from aoft_deploy.serving.protocol.refusals import Refusal

HALF = (0.5, 0.5, 0.5)
prepare = Preprocessing(224, 0.9, HALF, HALF)

def now():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

for path in map(Path, sys.argv[1:]):
    data, status, message = path.read_bytes(), 200, ""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start = now(), time.process_time()
    try:
        decode_sample(data, prepare, 224, 10**6)
    except Refusal as refusal:
        status, message = refusal.status, refusal.message
    print(json.dumps([status, message, time.process_time() - start, peak() - before]))
"""


def costs(
    pictures: Mapping[str, bytes], folder: Path, warm: Mapping[str, bytes]
) -> dict[str, Cost]:
    """Read pictures one after another in a subprocess.

    Args:
        pictures: Pictures to measure, by name.
        folder: Folder for the files.
        warm: Valid pictures to read first.
    """
    paths = []
    for i, data in enumerate([*warm.values(), *pictures.values()]):
        paths.append(folder / str(i))
        paths[-1].write_bytes(data)
    command = [sys.executable, "-c", READER, *map(str, paths)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    results: list[Any] = [json.loads(line) for line in done.stdout.splitlines()]
    return {n: Cost(*cost) for n, cost in zip(pictures, results[len(warm) :], strict=True)}
