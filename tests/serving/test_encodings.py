"""Compression of bodies, and the choice of an encoding."""

from __future__ import annotations

import gzip
import random
import tracemalloc
import zlib

import pytest
import werkzeug.datastructures
import werkzeug.http
from hypothesis import given, settings
from hypothesis import strategies as st

from aoft_deploy.serving.protocol.refusals import Refusal
from aoft_deploy.serving.transport.encodings import (
    MAX_MEMBERS,
    acceptable,
    compressed,
    decompressed,
)


def test_bodies_are_decompressed_and_compressed() -> None:
    data = bytes(range(256)) * 40
    for name, packed in (
        ("gzip", gzip.compress(data)),
        ("Deflate", zlib.compress(data)),
        ("identity", data),
    ):
        assert decompressed(packed, name, len(data)) == data
    for accepted in ("gzip, deflate, br", "deflate", "br;q=1, GZIP;q=0.5"):
        packed, chosen = compressed(data, acceptable(accepted))
        assert chosen and len(packed) < len(data) and decompressed(packed, chosen, 10**6) == data
    assert compressed(data, acceptable("br")) == (data, None)
    assert compressed(b"short", acceptable("gzip"))[1] is None
    packed, chosen = compressed(b"short", acceptable("gzip, identity;q=0"))
    assert chosen == "gzip" and gzip.decompress(packed) == b"short"


@pytest.mark.parametrize(
    ("accepted", "encodings"),
    [
        (None, ["identity"]),
        ("", ["identity"]),
        ("gzip", ["gzip", "identity"]),
        ("gzip;q=0", ["identity"]),
        ("gzip; q=0.000", ["identity"]),
        ("gzip;q=0, deflate", ["deflate", "identity"]),
        ("deflate;q=0.9, gzip;q=0.8", ["deflate", "gzip", "identity"]),
        ("deflate, gzip", ["gzip", "deflate", "identity"]),
        ("identity, gzip;q=0.5", ["identity", "gzip"]),
        ("gzip;q=0.5, identity;q=0.5", ["gzip", "identity"]),
        ("gzip, identity;q=0", ["gzip"]),
        ("GZIP ; Q=0.001", ["gzip", "identity"]),
        ("x-gzip", ["gzip", "identity"]),
        ("*", ["gzip", "deflate", "identity"]),
        ("*;q=0.1, identity;q=0.9", ["identity", "gzip", "deflate"]),
        ("*;q=0, gzip", ["gzip"]),
        ("*, gzip;q=0", ["deflate", "identity"]),
        ("br, zstd", ["identity"]),
        ("gzip;q=2", ["identity"]),
        ("gzip;q=-1, deflate;q=x, ;q=1", ["identity"]),
        (", ,gzip,", ["gzip", "identity"]),
    ],
)
def test_accept_encoding_is_obeyed(accepted: str | None, encodings: list[str]) -> None:
    assert acceptable(accepted) == encodings


@pytest.mark.parametrize(
    "accepted", ["*;q=0", "identity;q=0", "identity;q=0, gzip;q=0", "br, *;q=0"]
)
def test_a_client_that_accepts_no_encoding_is_refused(accepted: str) -> None:
    with pytest.raises(Refusal, match="give gzip, deflate or identity") as caught:
        acceptable(accepted)
    assert caught.value.status == 406


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    asked=st.dictionaries(
        st.sampled_from(["gzip", "deflate", "identity", "br"]), st.integers(0, 10), min_size=1
    )
)
def test_the_order_of_encodings_agrees_with_werkzeug(asked: dict[str, int]) -> None:
    header = ", ".join(f"{name};q={q / 10:.1f}" for name, q in asked.items())
    theirs = werkzeug.http.parse_accept_header(header, werkzeug.datastructures.Accept)
    wanted = {name: theirs.quality(name) for name in ("gzip", "deflate", "identity")}
    if "identity" not in asked:
        wanted["identity"] = 1e-9  # RFC 9110: accepted unless it is refused
    try:
        found = acceptable(header)
    except Refusal:
        found = []
    assert set(found) == {name for name, quality in wanted.items() if quality}
    assert [wanted[name] for name in found] == sorted(map(wanted.__getitem__, found), reverse=True)


def test_several_gzip_members_form_one_body() -> None:
    parts = [b"one" * 1000, b"", random.Random(1).randbytes(400_000), b"three"]
    whole = b"".join(gzip.compress(part) for part in parts)
    for packed in (whole, whole + bytes(1000)):
        assert decompressed(packed, "gzip", 10**6) == gzip.decompress(packed) == b"".join(parts)
        assert decompressed(memoryview(packed), "X-GZIP", 10**6) == b"".join(parts)
    for wrong in (whole[:-1], whole + b"x", whole + bytes(9) + b"x", whole[: len(whole) // 2]):
        with pytest.raises((OSError, EOFError, zlib.error)):
            gzip.decompress(wrong)
        with pytest.raises(Refusal) as caught:
            decompressed(wrong, "gzip", 10**6)
        assert caught.value.status == 400
    with pytest.raises(Refusal, match="decompresses to more than 403004 bytes"):
        decompressed(whole, "gzip", 403_004)
    assert len(decompressed(whole, "gzip", 403_005)) == 403_005


def test_the_number_of_gzip_members_is_limited() -> None:
    empty = gzip.compress(b"")
    assert decompressed(empty * MAX_MEMBERS, "gzip", 10) == b""
    with pytest.raises(Refusal, match="more than 10000 gzip members") as caught:
        decompressed(empty * (MAX_MEMBERS + 1), "gzip", 10)
    assert caught.value.status == 413


@pytest.mark.parametrize("name", ["gzip", "deflate"])
def test_damaged_compression_is_refused(name: str) -> None:
    pack = gzip.compress if name == "gzip" else zlib.compress
    packed = pack(random.Random(0).randbytes(5000))
    for wrong in (b"", b"garbage", packed[:-1], packed[:100], packed + b"x"):
        with pytest.raises(Refusal) as caught:
            decompressed(wrong, name, 10**6)
        assert caught.value.status == 400
    with pytest.raises(Refusal, match="use gzip or deflate") as caught:
        decompressed(packed, "br", 10**6)
    assert caught.value.status == 415


def test_bytes_after_a_deflate_body_are_refused() -> None:
    packed = zlib.compress(b"one")
    for wrong in (packed + packed, packed + b"\0", packed + bytes(2**19)):
        with pytest.raises(
            Refusal, match="More bytes follow the end of the deflate body"
        ) as caught:
            decompressed(wrong, "deflate", 10**6)
        assert caught.value.status == 400


def test_a_decompression_bomb_is_bounded_by_the_limit() -> None:
    pack = zlib.compressobj(9)
    bomb = b"".join(pack.compress(bytes(2**20)) for _ in range(256)) + pack.flush()
    tracemalloc.start()
    try:
        with pytest.raises(Refusal, match="decompresses to more than") as caught:
            decompressed(bomb, "deflate", 8 * 2**20)
        assert caught.value.status == 413 and tracemalloc.get_traced_memory()[1] < 12 * 2**20
    finally:
        tracemalloc.stop()
