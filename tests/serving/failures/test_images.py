"""Bad, large and unusual images."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bombs import BESIDE, LARGE, png
from failure_requests import (
    CLASSIFY,
    PNG,
    encoded,
)
from PIL import Image

from aoft_deploy.artefacts.prediction import load_classifier

PICTURES: dict[str, tuple[bytes, int]] = {
    "34 empty": (b"", 400),
    "34 random": (b"\1\2\3" * 50, 415),
    "34 truncated": (PNG[:200], 400),
    "34 header only": (PNG[:33], 400),
    "34 HTML": (b"<html></html>", 415),
    "34 SVG": (b"<svg/>", 415),
    "34 PDF": (b"%PDF-1.7", 415),
    "36 TIFF": (encoded("TIFF"), 415),
    "36 GIF": (encoded("GIF"), 415),
    "36 EPS": (encoded("EPS"), 415),
    "36 BMP": (encoded("BMP"), 415),
    "36 PSD": (b"8BPS\0\1" + bytes(40), 415),
    "36 FITS": (b"SIMPLE  =                    T".ljust(2880), 415),
}


def form(content: bytes, name: str, kind: str) -> tuple[bytes, dict[str, str]]:
    """A multipart form with one file."""
    head = f'--x\r\nContent-Disposition: form-data; name="f"; filename="{name}"\r\n'
    head += f"Content-Type: {kind}\r\n\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    return head.encode() + content + b"\r\n--x--\r\n", headers


@pytest.mark.parametrize("name", PICTURES)
def test_a_bad_image_is_refused(served: Any, name: str) -> None:
    content, status = PICTURES[name]
    for kind in ("image/png", "application/octet-stream", "text/html"):
        headers = {"Content-Type": kind}
        assert served.refused("POST", CLASSIFY, content, headers)[0] == status
    renamed = form(content, "picture.png", "image/png")
    assert served.refused("POST", CLASSIFY, *renamed)[0] == status


def test_file_name_and_content_type_of_an_image_are_ignored(served: Any) -> None:
    for name, kind in (("a.tiff", "image/tiff"), ("a.exe", "text/html"), ("../../a", "x")):
        assert served.ask("POST", CLASSIFY, *form(PNG, name, kind))[0] == 200


@pytest.mark.parametrize("name", LARGE)
def test_an_image_with_too_many_pixels_is_refused(served: Any, name: str) -> None:
    content = LARGE[name]()
    assert len(content) < 100_000
    with served.within(20 * 2**20):
        status, message = served.refused("POST", CLASSIFY, content)
    assert status == 413 and "pixels, above 10000000" in message


@pytest.mark.parametrize("name", BESIDE)
def test_an_image_with_large_metadata_is_refused(served: Any, name: str) -> None:
    with served.within(20 * 2**20):
        assert served.refused("POST", CLASSIFY, BESIDE[name]())[0] == 400


def test_many_large_images_at_once_are_refused(served: Any) -> None:
    pictures = [make() for make in LARGE.values()] * 5
    with served.within(20 * 2**20), ThreadPoolExecutor(10) as pool:
        found = list(pool.map(lambda p: served.refused("POST", CLASSIFY, p)[0], pictures))
    assert set(found) == {413}


def odd(make: Callable[..., Image.Image]) -> dict[str, tuple[bytes, Image.Image]]:
    """Lossless images of unusual formats, each with the equivalent plain image."""
    plain = make(30, 20, seed=5)
    values = np.asarray(plain)
    grey = np.asarray(plain.convert("L"))
    seen = np.indices(grey.shape).sum(0) % 2 == 0
    on_white = np.where(seen, grey, 255).astype(np.uint8)
    palette = plain.quantize(16)
    exif = Image.Exif()
    exif[0x0112] = 6
    high = values.astype(">u2") * 257

    def saved(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
        stream = io.BytesIO()
        image.save(stream, format, **options)
        return stream.getvalue()

    def colour(pixels: Any) -> Image.Image:
        return Image.fromarray(np.asarray(pixels)).convert("RGB")

    lossless = {"lossless": True, "save_all": True, "append_images": [make(30, 20, seed=6)]}
    rows = b"".join(b"\0" + row.tobytes() for row in high)
    cmyk = saved(plain.convert("CMYK"), "JPEG", quality=95)
    long = make(30000, 1, seed=7)
    return {
        "16 bits, grey": (saved(Image.fromarray(grey.astype(np.uint16) * 257)), colour(grey)),
        "16 bits, colour": (png(30, 20, zlib.compress(rows), depth=16, kind=2), plain),
        "CMYK": (cmyk, Image.open(io.BytesIO(cmyk)).convert("RGB")),
        "LA": (
            saved(Image.fromarray(np.dstack([grey, seen * np.uint8(255)]), "LA")),
            colour(on_white),
        ),
        "P": (saved(palette), palette.convert("RGB")),
        "1": (saved(Image.fromarray(seen)), colour(seen * np.uint8(255))),
        "EXIF 6": (saved(plain.rotate(90, expand=True), exif=exif), plain),
        "animated PNG": (saved(plain, save_all=True, append_images=[make(30, 20, seed=6)]), plain),
        "animated WebP": (saved(plain, "WEBP", **lossless), plain),
        "1 x 1": (saved(plain.crop((0, 0, 1, 1))), plain.crop((0, 0, 1, 1))),
        "30000 x 1": (saved(long), long),
        "1 x 30000": (saved(long.rotate(90, expand=True)), long.rotate(90, expand=True)),
    }


def test_unusual_images_are_classified_like_plain_ones(
    served: Any, artefact: Path, make_picture: Callable[..., Image.Image]
) -> None:
    pictures = odd(make_picture)
    wanted = load_classifier(artefact).predict([plain for _, plain in pictures.values()], top=5)
    for (name, (content, _)), row in zip(pictures.items(), wanted, strict=True):
        status, _, answer = served.ask("POST", CLASSIFY, content)
        assert status == 200, name
        (found,) = json.loads(answer)["predictions"]
        probabilities = {p["label"]: p["probability"] for p in found}
        expected = {p.label: p[1] for p in row}
        assert probabilities == pytest.approx(expected, abs=1e-6), name
    assert len({tuple(p[1] for p in row) for row in wanted}) > 6
