"""Bodies, encodings, forms, pictures, counters, settings: the server's parts without a server."""

from __future__ import annotations

import asyncio
import email.policy
import gzip
import io
import platform
import random
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import werkzeug.datastructures
import werkzeug.http
from bombs import BESIDE, LARGE, Cost, costs, flat
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from aoft_deploy.artefacts.onnx_metadata import read_metadata
from aoft_deploy.data.images import read_image
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import CheckpointError, SettingError
from aoft_deploy.serving.endpoints.images import decode_sample
from aoft_deploy.serving.protocol.refusals import Refusal
from aoft_deploy.serving.repository.names import artefact_name
from aoft_deploy.serving.settings import Settings, read_toml
from aoft_deploy.serving.telemetry.metrics import Counter, Histogram, exposition, gauge
from aoft_deploy.serving.telemetry.statistics import MAX_MODELS, Statistics
from aoft_deploy.serving.transport.bodies import Bodies
from aoft_deploy.serving.transport.encodings import (
    MAX_MEMBERS,
    acceptable,
    compressed,
    decompressed,
)
from aoft_deploy.serving.transport.inflow import Disconnected
from aoft_deploy.serving.transport.uploads import uploaded_files

HALF = (0.5, 0.5, 0.5)


def receiving(*parts: bytes, delay: float = 0.0, ends: bool = True) -> Callable[[], Any]:
    left = list(parts)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(delay)
        if not left:
            if ends:
                return {"type": "http.disconnect"}
            await asyncio.sleep(60)
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left) or not ends}

    return receive


def read(bodies: Bodies, receive: Callable[[], Any], length: str | None = None) -> bytes:
    return bytes(asyncio.run(bodies.read(receive, length)))


def test_a_body_is_read_whole_and_counted_until_it_is_released() -> None:
    bodies = Bodies(10, 15, 1.0)
    assert read(bodies, receiving(b"abc", b"", b"def"), "6") == b"abcdef"
    assert bodies.bytes == 6
    with pytest.raises(Refusal, match="holds too many bytes") as caught:
        read(bodies, receiving(b"0123456789"))
    assert caught.value.status == 429 and caught.value.close and bodies.bytes == 6
    bodies.release(6)
    assert read(bodies, receiving(b"0123456789")) == b"0123456789"


@pytest.mark.parametrize("length", ["11", "1000000000000", "9" * 5000, None])
def test_a_body_that_is_too_large_is_refused_as_soon_as_it_is_known(length: str | None) -> None:
    bodies, read_parts = Bodies(10, 100, 1.0), list[bytes]()

    async def receive() -> dict[str, Any]:
        read_parts.append(b"12345")
        return {"type": "http.request", "body": b"12345", "more_body": True}

    with pytest.raises(Refusal, match="more than 10 bytes") as caught:
        read(bodies, receive, length)
    assert caught.value.status == 413 and caught.value.close and bodies.bytes == 0
    assert len(read_parts) == (0 if length else 3)


@pytest.mark.parametrize("length", ["abc", "-1", "1.5", "", "٣"])
def test_a_length_that_is_no_number_is_refused(length: str) -> None:
    with pytest.raises(Refusal, match="Content-Length is"):
        read(Bodies(10, 100, 1.0), receiving(b""), length)


def test_a_body_that_does_not_come_ends_in_time() -> None:
    bodies = Bodies(10, 100, 0.1)  # the client would send nothing for a minute
    with pytest.raises(Refusal, match="did not arrive") as caught:
        read(bodies, receiving(b"ab", ends=False), "9")
    assert caught.value.status == 408 and caught.value.close and bodies.bytes == 0


def test_a_body_that_drips_has_no_more_time() -> None:
    with pytest.raises(Refusal, match="did not arrive"):
        read(Bodies(100, 1000, 0.1), receiving(*[b"a"] * 50, delay=0.01))


def test_a_client_that_goes_away_leaves_nothing() -> None:
    bodies = Bodies(10, 100, 1.0)

    async def receive() -> dict[str, Any]:
        if bodies.bytes:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": b"abc", "more_body": True}

    with pytest.raises(Disconnected):
        read(bodies, receive)
    assert bodies.bytes == 0


def test_half_sent_bodies_end_soon_when_the_server_drains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aoft_deploy.serving.transport.bodies.DRAIN_SECONDS", 0.05)

    async def run() -> None:
        bodies = Bodies(10, 100, 60.0)
        half = asyncio.create_task(bodies.read(receiving(b"ab", ends=False), None))
        await asyncio.sleep(0.02)
        bodies.drain()
        for reading in (half, bodies.read(receiving(b"ab", ends=False), None)):
            with pytest.raises(Refusal, match="did not arrive"):
                await asyncio.wait_for(reading, 1)

    asyncio.run(run())


def test_encodings_are_undone_and_chosen() -> None:
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
def test_what_a_client_accepts_is_obeyed(accepted: str | None, encodings: list[str]) -> None:
    assert acceptable(accepted) == encodings


@pytest.mark.parametrize(
    "accepted", ["*;q=0", "identity;q=0", "identity;q=0, gzip;q=0", "br, *;q=0"]
)
def test_a_client_that_accepts_nothing_is_told(accepted: str) -> None:
    with pytest.raises(Refusal, match="give gzip, deflate or identity") as caught:
        acceptable(accepted)
    assert caught.value.status == 406


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    asked=st.dictionaries(
        st.sampled_from(["gzip", "deflate", "identity", "br"]), st.integers(0, 10), min_size=1
    )
)
def test_the_best_encoding_is_werkzeug_s(asked: dict[str, int]) -> None:
    header = ", ".join(f"{name};q={q / 10:.1f}" for name, q in asked.items())
    theirs = werkzeug.http.parse_accept_header(header, werkzeug.datastructures.Accept)
    wanted = {name: theirs.quality(name) for name in ("gzip", "deflate", "identity")}
    if "identity" not in asked:
        wanted["identity"] = 1e-9  # RFC 9110: taken, unless it is refused
    try:
        found = acceptable(header)
    except Refusal:
        found = []
    assert set(found) == {name for name, quality in wanted.items() if quality}
    assert [wanted[name] for name in found] == sorted(map(wanted.__getitem__, found), reverse=True)


def test_several_members_of_gzip_are_one_body() -> None:
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


def test_many_members_of_gzip_cost_no_more_than_a_few() -> None:
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


def test_a_second_body_of_deflate_is_refused() -> None:
    packed = zlib.compress(b"one")
    for wrong in (packed + packed, packed + b"\0", packed + bytes(2**19)):
        with pytest.raises(
            Refusal, match="More bytes follow the end of the deflate body"
        ) as caught:
            decompressed(wrong, "deflate", 10**6)
        assert caught.value.status == 400


def test_a_bomb_takes_no_more_memory_than_a_body_may() -> None:
    pack = zlib.compressobj(9)
    bomb = b"".join(pack.compress(bytes(2**20)) for _ in range(256)) + pack.flush()
    tracemalloc.start()
    try:
        with pytest.raises(Refusal, match="decompresses to more than") as caught:
            decompressed(bomb, "deflate", 8 * 2**20)
        assert caught.value.status == 413 and tracemalloc.get_traced_memory()[1] < 12 * 2**20
    finally:
        tracemalloc.stop()


def form(*files: bytes, boundary: bytes = b"xyz", end: bytes = b"--") -> bytes:
    head = b'Content-Disposition: form-data; name="file"; filename="../../a.jpg"\r\n\r\n'
    parts = [b"--" + boundary + b"\r\n" + head + file + b"\r\n" for file in files]
    return b"".join(parts) + b"--" + boundary + end + b"\r\n"


KIND = "multipart/form-data; boundary=xyz"


def test_files_of_a_form_come_in_their_order() -> None:
    files = [b"one", b"\r\n--xy\r\n", b"", bytes(range(256)) * 100]
    assert uploaded_files(form(*files), KIND, 4) == files


def field(name: str, value: bytes, more: bytes = b"") -> bytes:
    head = b'--xyz\r\nContent-Disposition: form-data; name="%s"\r\n%s\r\n' % (name.encode(), more)
    return head + value + b"\r\n"


IMAGE = b"Content-Type: image/png\r\n"
TEXT = b"Content-Type: text/plain; charset=utf-8\r\n"


@pytest.mark.parametrize(
    ("fields", "files"),
    [
        ([field("top", b"5"), form(b"one", b"two")], [b"one", b"two"]),
        ([field("a", b"5", TEXT), field("b", b"x" * 9000), form(b"one")], [b"one"]),
        ([field("picture", b"bytes", IMAGE), form(b"one")], [b"bytes", b"one"]),
        ([*[field("a", b"")] * 64, form(*[b"x"] * 4)], [b"x"] * 4),
    ],
)
def test_fields_of_a_form_are_no_files(fields: list[bytes], files: list[bytes]) -> None:
    assert uploaded_files(b"".join(fields), KIND, 4) == files


def test_a_form_of_fields_alone_is_told() -> None:
    with pytest.raises(Refusal, match="has no file: give one with a filename") as caught:
        uploaded_files(field("top", b"5") + b"--xyz--\r\n", KIND, 4)
    assert caught.value.status == 400
    with pytest.raises(Refusal, match="more than 64 fields") as caught:
        uploaded_files(field("top", b"5") * 65 + form(b"one"), KIND, 4)
    assert caught.value.status == 413


@pytest.mark.parametrize(
    "before",
    [b"", b"\r\n", b"This is a form.\r\n", b"a --xyz\r\n--xyzz\r\n--\r\n", b"-" * 99 + b"\r\n"],
)
@pytest.mark.parametrize("after", [b"", b"The end", b"\r\n\r\n--xyz\r\nmore\r\n"])
@pytest.mark.parametrize("padding", [b"", b" \t "])
def test_what_stands_beside_a_form_is_passed_over_as_the_mail_library_does(
    before: bytes, after: bytes, padding: bytes
) -> None:
    files = [b"one", b"\r\n--xy\r\n", bytes(range(48, 126)) * 9]
    whole = form(*files).replace(b"--xyz\r\n", b"--xyz" + padding + b"\r\n")
    head = b"MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=xyz\r\n\r\n"
    message = email.message_from_bytes(head + before + whole + after, policy=email.policy.HTTP)
    theirs = [part.get_payload(decode=True) for part in message.iter_parts()]
    assert uploaded_files(before + whole + after, KIND, 4) == theirs == files


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (form(b"a"), "multipart/form-data", 400),
        (form(b"a"), "multipart/form-data; boundary=" + "x" * 100, 400),
        (form(b"a"), "multipart/form-data; boundary=other", 400),
        (form(b"a")[:-10], KIND, 400),
        (form(), KIND, 400),
        (b"", KIND, 400),
        (b"junk", KIND, 400),
        (form(*[b"a"] * 5), KIND, 413),
        (b"--xyz\r\nA: " + b"b" * 9000 + b"\r\n\r\nc\r\n--xyz--\r\n", KIND, 400),
    ],
)
def test_what_is_no_form_is_refused(body: bytes, kind: str, status: int) -> None:
    with pytest.raises(Refusal) as caught:
        uploaded_files(body, kind, 4)
    assert caught.value.status == status


@settings(max_examples=200, deadline=None)
@given(cut=st.integers(0, 400), junk=st.binary(max_size=30))
def test_a_distorted_form_gives_files_or_a_refusal(cut: int, junk: bytes) -> None:
    whole = form(b"one", b"two" * 20)
    try:
        files = uploaded_files(whole[:cut] + junk + whole[cut + len(junk) :], KIND, 4)
    except Refusal as refusal:
        assert refusal.status in (400, 413)
    else:
        assert all(isinstance(file, bytes) for file in files)


PREPARE = Preprocessing(16, 0.9, HALF, HALF)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def prepared(data: bytes, max_pixels: int = 10**6) -> Any:
    return decode_sample(data, PREPARE, 16, max_pixels)


WHOLE = ["PNG", "JPEG", "WEBP"]


@pytest.mark.parametrize("format", WHOLE)
@pytest.mark.parametrize("size", [(40, 30), (1, 1), (300, 2), (90, 127), (1, 300), (15000, 1)])
def test_a_picture_becomes_what_the_classifier_sees(
    format: str, size: tuple[int, int], make_picture: Callable[..., Image.Image]
) -> None:
    data = encoded(make_picture(*size, seed=1), format)
    assert np.array_equal(prepared(data), PREPARE(read_image(data)))


def test_a_large_jpeg_is_decoded_smaller_and_differs_by_a_level(
    make_picture: Callable[..., Image.Image],
) -> None:
    prepare = Preprocessing(64, 0.9, HALF, HALF)
    data = encoded(make_picture(1600, 1200, seed=2), "JPEG", quality=90)
    whole = prepare.pixels(read_image(data)).astype(int)
    small = decode_sample(data, prepare.pixels, 64, 10**8).astype(int)
    assert 0 < np.abs(whole - small).max() <= 3 and np.abs(whole - small).mean() < 0.5
    assert read_image(data, least=256).size == (400, 300)


MODES = ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"]


@pytest.mark.parametrize("mode", MODES)
def test_every_meaning_of_pixels_is_the_library_s(
    mode: str, make_picture: Callable[..., Image.Image]
) -> None:
    image = make_picture(30, 20, seed=3)
    if mode == "I;16":
        image = Image.fromarray(np.full((20, 30), 40000, np.uint16))
    else:
        image = image.convert(mode)
    data = encoded(image, "JPEG" if mode == "CMYK" else "PNG")
    assert np.array_equal(prepared(data), PREPARE(read_image(data)))
    if mode == "I;16":
        assert int(decode_sample(data, PREPARE.pixels, 16, 10**6)[8, 8, 0]) == 156


@pytest.mark.parametrize("size", [(30000, 1), (1, 30000)])
@pytest.mark.parametrize("side", [16, 224])
def test_a_picture_like_a_thread_is_what_the_library_sees(
    size: tuple[int, int], side: int, make_picture: Callable[..., Image.Image]
) -> None:
    prepare = Preprocessing(side, 0.9, HALF, HALF)
    image = make_picture(*size, seed=7)
    assert np.array_equal(decode_sample(encoded(image), prepare, side, 10**6), prepare(image))


def test_orientation_and_frames_are_the_library_s(
    make_picture: Callable[..., Image.Image],
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(make_picture(30, 20, seed=4), "JPEG", exif=exif)
    assert np.array_equal(prepared(data), PREPARE(read_image(data)))
    frames = [make_picture(30, 20, seed=seed) for seed in (5, 6)]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert np.array_equal(prepared(data), PREPARE(frames[0]))


PIXEL = encoded(Image.new("RGB", (1, 1)))
NO_PICTURES: dict[str, tuple[bytes, int]] = {
    "empty": (b"", 400),
    "random": (random.Random(1).randbytes(500), 415),
    "HTML": (b"<html><body>", 415),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415),
    "PDF": (b"%PDF-1.7\n", 415),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", 415),
    "TIFF": (encoded(Image.new("RGB", (4, 4)), "TIFF"), 415),
    "GIF": (encoded(Image.new("RGB", (4, 4)), "GIF"), 415),
    "BMP": (encoded(Image.new("RGB", (4, 4)), "BMP"), 415),
    "PSD": (b"8BPS\0\1" + bytes(40), 415),
    "FITS": (b"SIMPLE  =                    T", 415),
    "truncated PNG": (encoded(Image.effect_noise((64, 64), 50))[:900], 400),
    "header of a PNG": (PIXEL[:8], 400),
    "header of a JPEG": (b"\xff\xd8\xff\xe0", 400),
    "truncated JPEG": (encoded(Image.new("RGB", (64, 64)), "JPEG")[:300], 400),
    "header of a WebP": (b"RIFF\0\0\0\0WEBPVP8 ", 400),
    "damaged PNG": (PIXEL.replace(b"IDAT", b"IDOT"), 400),
    **{name: (make(), 413) for name, make in LARGE.items()},
    "30000 x 100": (flat(30000, 100), 413),
    **{name: (make(), 400) for name, make in BESIDE.items()},
}


THREADS = [(1, 65), (1, 1000), (1040, 1), (30000, 1)]


@pytest.fixture(scope="module")
def cost_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Cost]:
    pictures = {name: data for name, (data, _) in NO_PICTURES.items()}
    pictures |= {str(size): encoded(Image.new("RGB", size)) for size in THREADS}
    warm = {format: encoded(Image.new("RGB", (300, 200)), format) for format in WHOLE}
    return costs(pictures, tmp_path_factory.mktemp("pictures"), warm)


@pytest.mark.parametrize("name", NO_PICTURES)
def test_what_is_no_good_picture_is_refused_before_it_costs_anything(
    name: str, cost_of: dict[str, Cost]
) -> None:
    cost = cost_of[name]
    assert cost.status == NO_PICTURES[name][1]
    assert ("pixels, above" in cost.message) is (cost.status == 413)
    assert cost.seconds < 0.05 and cost.memory < 20 * 2**20


@pytest.mark.parametrize("size", THREADS)
def test_a_picture_like_a_thread_costs_little(
    size: tuple[int, int], cost_of: dict[str, Cost]
) -> None:
    cost = cost_of[str(size)]
    assert cost.status == 200 and cost.seconds < 0.25 and cost.memory < 24 * 2**20


def test_metrics_read_as_prometheus_writes_them() -> None:
    counter = Counter("a_total", "Count.", ("model",))
    counter.add('x"\\\ny')
    counter.add("b", amount=2.5)
    histogram = Histogram("b_seconds", "Time.", ("stage",), (0.1, 1))
    for value in (0.05, 0.1, 0.5, 7):
        histogram.observe(value, "s")
    level = gauge("c", "Level.", (), {(): 3.0})
    assert exposition([counter.lines(), histogram.lines(), level]).splitlines() == [
        "# HELP a_total Count.",
        "# TYPE a_total counter",
        r'a_total{model="x\"\\\ny"} 1',
        'a_total{model="b"} 2.5',
        "# HELP b_seconds Time.",
        "# TYPE b_seconds histogram",
        'b_seconds_bucket{stage="s",le="0.1"} 2',
        'b_seconds_bucket{stage="s",le="1"} 3',
        'b_seconds_bucket{stage="s",le="+Inf"} 4',
        'b_seconds_sum{stage="s"} 7.65',
        'b_seconds_count{stage="s"} 4',
        "# HELP c Level.",
        "# TYPE c gauge",
        "c 3",
    ]


def test_statistics_count_requests_batches_and_nanoseconds() -> None:
    statistics = Statistics()
    statistics["a"].succeeded(2, 5, True, (1, 2, 3, 4))
    statistics["a"].succeeded(1, 5, False, (1, 2, 3, 4))
    statistics["a"].failed(7)
    report = statistics["a"].report("a")
    assert (report["inference_count"], report["execution_count"]) == (3, 1)
    assert report["inference_stats"]["success"] == {"count": 2, "ns": 20}
    assert report["inference_stats"]["fail"] == {"count": 1, "ns": 7}
    (batch,) = report["batch_stats"]
    assert batch["batch_size"] == 5 and batch["compute_infer"] == {"count": 1, "ns": 3}
    for i in range(MAX_MODELS + 5):
        statistics[f"m{i}"].failed(1)
    assert len(statistics) == MAX_MODELS and "a" not in statistics


def test_settings_come_from_a_file_beside_their_defaults(tmp_path: Path) -> None:
    config = tmp_path / "serve.toml"
    config.write_text(
        'port = 9000\nmax-batch = 4\nmax_wait = 0\nrepository = "models"\nlog-requests = true\n'
        'artefacts = { pets = "pets.onnx" }\n'
    )
    found = read_toml(config)
    assert found.pop("artefacts") == [f"pets={tmp_path}/pets.onnx"]
    read_settings = Settings(**found)
    assert (read_settings.port, read_settings.max_batch, read_settings.host) == (
        9000,
        4,
        "127.0.0.1",
    )
    assert read_settings.repository == tmp_path / "models" and read_settings.log_requests
    config.write_text('artefacts = ["a.onnx", "/b/c.onnx"]')
    assert read_toml(config)["artefacts"] == [f"{tmp_path}/a.onnx", "/b/c.onnx"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("port = ", "cannot be read as TOML"),
        ("prot = 1", "unknown setting 'prot'. Known: admin-token-file, artefacts"),
        ("artefacts = 3", "must be a list of paths"),
        ('port = "1"', "`port` is '1': give a whole number"),
        ("port = true", "`port` is True: give a whole number"),
        ("port = 70000", "`port` is 70000: use from 0 to 65535"),
        ("max-batch = 0", "`max_batch` is 0: use from 1"),
        ("repository = 1", "`repository` is 1: give a path"),
        ("host = 1", "`host` is 1: give a text"),
        ("log-requests = 1", "`log_requests` is 1: give true or false"),
        ("max-wait = nan", "`max_wait` is nan"),
        ('http = "h2"', "use h11 or httptools"),
    ],
)
def test_a_bad_setting_is_told(text: str, words: str, tmp_path: Path) -> None:
    config = tmp_path / "serve.toml"
    config.write_text(text)
    with pytest.raises(SettingError, match=words):
        found = read_toml(config)
        found.pop("artefacts", None)
        Settings(**found)


def test_a_missing_file_of_settings_is_told(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="cannot be read as TOML"):
        read_toml(tmp_path / "none.toml")


def test_an_artefact_s_name_is_its_file_s_or_given(tmp_path: Path) -> None:
    assert artefact_name("a/b.onnx") == ("b", Path("a/b.onnx"))
    assert artefact_name("x=a/b.onnx") == ("x", Path("a/b.onnx"))
    assert artefact_name("a/x=b.onnx") == ("x=b", Path("a/x=b.onnx"))


def test_metadata_are_read_without_the_weights(artefact: Path) -> None:
    assert read_metadata(artefact) == {
        entry.key: entry.value for entry in onnx.load(artefact).metadata_props
    }


def outside(graph: onnx.GraphProto) -> None:
    tensor = graph.initializer[0]
    onnx.external_data_helper.set_external_data(tensor, location="../../../etc/passwd")
    tensor.ClearField("raw_data")


@pytest.mark.parametrize("place", ["graph", "attribute", "subgraph", "function", "sparse"])
def test_an_onnx_file_that_names_other_files_is_refused_wherever_it_does(
    artefact: Path, tmp_path: Path, place: str
) -> None:
    proto = onnx.load(artefact)
    inner = onnx.GraphProto()
    inner.initializer.append(proto.graph.initializer[0])
    outside(inner)
    if place == "graph":
        outside(proto.graph)
    elif place == "attribute":
        node = proto.graph.node.add(op_type="Constant")
        node.attribute.append(onnx.helper.make_attribute("value", inner.initializer[0]))
    elif place == "subgraph":
        node = proto.graph.node.add(op_type="If")
        node.attribute.append(onnx.helper.make_attribute("then_branch", inner))
    elif place == "function":
        node = proto.functions.add(name="f").node.add(op_type="Constant")
        node.attribute.append(onnx.helper.make_attribute("value", inner.initializer[0]))
    else:
        proto.graph.sparse_initializer.add().values.CopyFrom(inner.initializer[0])
    path = tmp_path / "outside.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(CheckpointError, match="keeps weights in other files"):
        read_metadata(path)


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_a_damaged_onnx_file_is_refused(artefact: Path, tmp_path: Path, cut: int) -> None:
    path = tmp_path / "cut.onnx"
    path.write_bytes(artefact.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="no ONNX model, or a damaged one"):
        read_metadata(path)
    with pytest.raises(CheckpointError, match="There is no file"):
        read_metadata(tmp_path / "none.onnx")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_nothing_but_an_error_comes_of_a_distorted_onnx_file(
    data: st.DataObject, artefact: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(artefact.read_bytes()[:4000])
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "distorted.onnx"
    path.write_bytes(content)
    try:
        read_metadata(path)
    except CheckpointError:
        pass


MEMORY = """
import sys
from pathlib import Path
from aoft_deploy.serving.memory import return_large_blocks

def resident():
    return int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0]) // 1024

if sys.argv[1] == "set":
    return_large_blocks()
batch = b"x" * 2**23
del batch  # the largest block that was freed
before = resident()
bodies, small = [], []
for number in range(32):
    bodies.append(bytes([number]) * 2**21)
    small.append([object() for _ in range(100)])
    small.append(bytes([number]) * 5000)
del bodies
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_large_blocks_are_given_back_between_small_ones_that_stay() -> None:
    kept = {}
    for how in ("set", "not"):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, how], capture_output=True, text=True, check=True
        )
        kept[how] = int(done.stdout)
    assert kept["set"] < 8 < 40 < kept["not"]  # of 64 MB
