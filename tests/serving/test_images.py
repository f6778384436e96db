"""Images from clients: samples, formats and limits."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from bombs import BESIDE, LARGE, Cost, costs, flat
from PIL import Image

from aoft_deploy.data.images import read_image
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.serving.endpoints.images import decode_sample

HALF = (0.5, 0.5, 0.5)

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
def test_a_sample_is_exactly_that_of_the_classifier(
    format: str, size: tuple[int, int], make_picture: Callable[..., Image.Image]
) -> None:
    data = encoded(make_picture(*size, seed=1), format)
    assert np.array_equal(prepared(data), PREPARE(read_image(data)))


def test_a_large_jpeg_is_decoded_smaller_with_a_small_difference(
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
def test_every_pixel_format_is_read_like_in_the_library(
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
def test_a_very_long_image_is_prepared_like_in_the_library(
    size: tuple[int, int], side: int, make_picture: Callable[..., Image.Image]
) -> None:
    prepare = Preprocessing(side, 0.9, HALF, HALF)
    image = make_picture(*size, seed=7)
    assert np.array_equal(decode_sample(encoded(image), prepare, side, 10**6), prepare(image))


def test_orientation_and_frames_are_read_like_in_the_library(
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
def test_a_bad_image_is_refused_at_low_cost(name: str, cost_of: dict[str, Cost]) -> None:
    cost = cost_of[name]
    assert cost.status == NO_PICTURES[name][1]
    assert ("pixels, above" in cost.message) is (cost.status == 413)
    assert cost.seconds < 0.05 and cost.memory < 20 * 2**20


@pytest.mark.parametrize("size", THREADS)
def test_a_very_long_image_costs_little(size: tuple[int, int], cost_of: dict[str, Cost]) -> None:
    cost = cost_of[str(size)]
    assert cost.status == 200 and cost.seconds < 0.25 and cost.memory < 24 * 2**20
