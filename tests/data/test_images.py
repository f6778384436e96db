from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image, ImageOps, TiffImagePlugin

from aoft_deploy.data.images import read_image, read_size
from aoft_deploy.errors import ImageError

LOSSLESS = ["PNG", "BMP", "GIF", "TIFF", "PPM"]


def gradient(width: int = 12, height: int = 8) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    red, green = x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1)
    return Image.fromarray(np.stack([red, green, 255 - red], axis=-1).astype(np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + body


def gif_header(width: int, height: int) -> bytes:
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0)
    return screen + b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x08"


def webp_header(width: int, height: int) -> bytes:
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    vp8x = b"VP8X" + struct.pack("<I", 10) + b"\x00" * 4 + canvas
    return b"RIFF" + struct.pack("<I", 4 + len(vp8x)) + b"WEBP" + vp8x


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    found = image.getpixel((x, y))
    assert isinstance(found, tuple)
    return found


@pytest.mark.parametrize("format", LOSSLESS)
def test_lossless_formats_keep_every_pixel(format: str) -> None:
    image = gradient()
    if format == "GIF":
        image = image.quantize(256).convert("RGB")
    assert read_image(encoded(image, format)).tobytes() == image.tobytes()


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_lossy_formats_decode_as_pillow_does(format: str) -> None:
    data = encoded(gradient(40, 30), format)
    with Image.open(io.BytesIO(data)) as plain:
        assert read_image(data).tobytes() == plain.convert("RGB").tobytes()


def test_path_content_and_stream_give_the_same_image(tmp_path: Path) -> None:
    path = tmp_path / "a picture.png"
    gradient().save(path)
    with path.open("rb") as stream:
        stream.read(5)  # reading starts at the beginning again
        images = [read_image(source) for source in (path, path.read_bytes(), stream)]
        assert not stream.closed
    assert {image.tobytes() for image in images} == {gradient().tobytes()}


def test_the_result_is_a_plain_loaded_image(tmp_path: Path) -> None:
    gradient().save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    (tmp_path / "a.png").unlink()
    assert type(image) is Image.Image
    assert image.mode == "RGB"


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "LAB", "I;16", "RGB"])
@pytest.mark.parametrize("size", [(1, 1), (7, 3)])
def test_every_mode_becomes_rgb_of_the_same_size(mode: str, size: tuple[int, int]) -> None:
    source = Image.new(mode, size)
    image = read_image(encoded(source, "TIFF"))
    assert (image.mode, image.size) == ("RGB", size)


def test_a_one_bit_image_is_black_and_white() -> None:
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert read_image(encoded(image)).tobytes() == bytes([0, 0, 0, 255, 255, 255])


def test_a_cmyk_jpeg_keeps_its_colours() -> None:
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    red, green, blue = pixel(read_image(data))
    assert red > 230
    assert max(green, blue) < 25


@pytest.mark.parametrize("alpha, expected", [(0, 255), (255, 40), (128, 147)])
@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparent_pixels_fade_into_white(mode: str, alpha: int, expected: int) -> None:
    image = Image.new(mode, (2, 2), (40, alpha) if mode == "LA" else (40, 40, 40, alpha))
    assert pixel(read_image(encoded(image))) == pytest.approx((expected,) * 3, abs=1)


def test_a_transparent_palette_entry_turns_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 200, 10, 10])
    image.putpixel((1, 0), 1)
    for transparency in (0, b"\x00\xff"):
        read = read_image(encoded(image, transparency=transparency))
        assert read.tobytes() == bytes([255, 255, 255, 200, 10, 10])


def test_a_transparent_colour_of_a_16_bit_png_turns_white() -> None:
    rows = b"\x00" + struct.pack(">3H", 0xFFFF, 0, 0x1234)
    transparency = chunk(b"tRNS", struct.pack(">3H", 0xFFFF, 0, 0))
    assert pixel(read_image(png(1, 1, 16, 2, rows, transparency))) == (255, 0, 0x12)


def grey_key(depth: int, values: list[int], key: int) -> bytes:
    """A grey PNG of a row of 8 values with a transparent one, as in RFC 2083 (4.2.9)."""
    bits = "".join(f"{value:0{depth}b}" for value in values)
    row = b"\x00" + int(bits, 2).to_bytes(len(bits) // 8)
    return png(len(values), 1, depth, 0, row, chunk(b"tRNS", struct.pack(">H", key)))


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_transparent_grey_of_a_png_turns_white_at_every_depth(depth: int) -> None:
    top = 2**depth - 1
    values = np.random.default_rng(depth).integers(0, top + 1, 8).tolist()
    # A neighbour with the same high byte, and a value that scaling maps to the same grey.
    key = values[3]
    values[4], values[5] = key ^ 1, min(key * 17 + 1, top)
    expected = [255 if v == key else (v >> 8 if depth == 16 else v * 255 // top) for v in values]
    read = np.asarray(read_image(grey_key(depth, values, key)))[0]
    assert read.tolist() == [[value] * 3 for value in expected]


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("depth", [8, 16])
def test_the_transparent_colour_of_a_png_turns_white_if_all_bits_are_equal(
    depth: int, interlaced: bool
) -> None:
    size, code = depth // 8, {8: "B", 16: "H"}[depth]
    key = (0xFFFF, 0, 0x1234) if depth == 16 else (255, 0, 0x34)
    colours = [key, (key[0], 0, key[2] + 1), (key[0] - 1, 0, key[2]), (*key[:2], 0)]
    rows = b"\x00" + b"".join(struct.pack(f">3{code}", *colour) for colour in colours)
    transparency = chunk(b"tRNS", struct.pack(">3H", *key))
    data = png(4, 1, depth, 2, rows, transparency)
    if interlaced:  # Adam7: in one row, passes 1, 4 and 6 have pixels 0, 2, and then 1 and 3
        pixels = [rows[1 + 3 * size * i : 1 + 3 * size * (i + 1)] for i in range(4)]
        body = b"\x00" + pixels[0] + b"\x00" + pixels[2] + b"\x00" + pixels[1] + pixels[3]
        header = struct.pack(">IIBBBBB", 4, 1, depth, 2, 0, 0, 1)
        data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + transparency
        data += chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")
    shift = depth - 8
    expected = [[255] * 3, *([value >> shift for value in colour] for colour in colours[1:])]
    assert np.asarray(read_image(data))[0].tolist() == expected
    assert np.asarray(read_image(io.BytesIO(data)))[0].tolist() == expected


@pytest.mark.parametrize("values", [(0, 0x1234, 0xFFFF), (0x00FF, 0x7FFF, 0x8000)])
def test_16_bit_channels_keep_their_high_byte(values: tuple[int, ...]) -> None:
    expected = [value >> 8 for value in values]
    grey = png(3, 1, 16, 0, b"\x00" + struct.pack(">3H", *values))
    assert np.asarray(read_image(grey))[0].tolist() == [[value] * 3 for value in expected]
    colour = png(1, 1, 16, 2, b"\x00" + struct.pack(">3H", *values))
    assert list(pixel(read_image(colour))) == expected


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_grey_tiffs_are_scaled_in_either_byte_order(order: str) -> None:
    values = struct.pack(f"{order}2H", 0x1234, 0xFFFF)
    tags = [(256, 2), (257, 1), (258, 16), (259, 1), (262, 1), (273, 0), (277, 1), (279, 4)]
    start = 8 + 2 + 12 * len(tags) + 4
    data = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    data += struct.pack(f"{order}H", len(tags))
    for tag, value in tags:
        data += struct.pack(f"{order}HHI", tag, 4, 1)
        data += struct.pack(f"{order}I", start if tag == 273 else value)
    image = read_image(data + b"\x00" * 4 + values)
    assert [pixel(image, x) for x in (0, 1)] == [(0x12,) * 3, (255,) * 3]


def test_a_16_bit_pgm_is_scaled() -> None:
    image = read_image(b"P5 2 1 65535\n" + struct.pack(">2H", 0x1234, 0xFFFF))
    assert [pixel(image, x) for x in (0, 1)] == [(0x12,) * 3, (255,) * 3]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_values_without_a_defined_white_are_refused(mode: str) -> None:
    with pytest.raises(ImageError, match="which have no defined white: save it with 8 or 16 bits"):
        read_image(encoded(Image.new(mode, (2, 2)), "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_exif_orientation_is_applied(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(gradient(24, 16), format, exif=exif)
    with Image.open(io.BytesIO(data)) as plain:
        expected = ImageOps.exif_transpose(plain).convert("RGB")
    image = read_image(data)
    assert image.size == ((16, 24) if orientation >= 5 else (24, 16))
    assert image.tobytes() == expected.tobytes()


@pytest.mark.parametrize("exif", [b"Exif\x00\x00nonsense", b"Exif\x00\x00MM\x00*\x00\x00\xff\xff"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_matter(exif: bytes) -> None:
    assert read_image(encoded(gradient(), "JPEG", exif=exif)).size == (12, 8)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_of_several_frames_is_read(format: str) -> None:
    first, second = (Image.new("RGB", (6, 4), colour) for colour in ("red", "blue"))
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(first, format, save_all=True, append_images=[second], **options)
    assert pixel(read_image(data)) == (255, 0, 0)


def test_a_colour_profile_changes_nothing() -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    data = encoded(gradient(), icc_profile=profile)
    assert read_image(data).tobytes() == gradient().tobytes()


BOMBS = {
    "png": png(100_000, 100_000, 8, 2, b""),
    "png, within Pillow's warning": png(10_000, 10_000, 8, 2, b""),
    "gif": gif_header(65_535, 65_535),
    "bmp": b"BM" + struct.pack("<IIIIiiHHIIIIII", 54, 0, 54, 40, 60_000, 60_000, 1, 24, *[0] * 6),
    "ppm": b"P6 100000 100000 255\n",
    "jpeg": b"\xff\xd8\xff\xc0"
    + struct.pack(">HBHHB", 17, 8, 60_000, 60_000, 3)
    + b"\x01\x11\x00" * 3
    + b"\xff\xda\x00\x0c\x03\x01\x00\x02\x11\x03\x11\x00\x3f\x00",
}


@pytest.mark.parametrize("read", [read_image, read_size])
@pytest.mark.parametrize("name", BOMBS)
def test_too_many_pixels_are_refused_by_the_header_alone(name: str, read: Any) -> None:
    with pytest.raises(ImageError, match=r"has \d+ x \d+ = [\d,]+ pixels, above the limit of 64,"):
        read(BOMBS[name])


def test_a_webp_bomb_is_refused_without_the_warning_of_pillow() -> None:
    with pytest.raises(ImageError, match=r"^Cannot read image of 30 bytes: [^.]*\.$") as caught:
        read_image(webp_header(16_383, 16_383))
    assert "DOS" not in str(caught.value)


def test_a_file_with_too_many_pixels_is_named(tmp_path: Path) -> None:
    (tmp_path / "huge.png").write_bytes(BOMBS["png"])
    with pytest.raises(ImageError, match=r"huge\.png.*10,000,000,000 pixels.*: shrink it first\.$"):
        read_image(tmp_path / "huge.png")


def test_the_limit_of_pixels_is_inclusive_and_adjustable() -> None:
    data = encoded(gradient(10, 10))
    assert read_size(data, max_pixels=100) == (10, 10)
    with pytest.raises(ImageError, match="10 x 10 = 100 pixels, above the limit of 99"):
        read_image(data, max_pixels=99)


def test_a_limit_above_that_of_pillow_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(encoded(gradient(6, 6))).size == (6, 6)
        if int(PIL.__version__.partition(".")[0]) >= 13:  # newer versions check WebP files too
            with pytest.raises(ImageError, match=r"size \(36 pixels\) exceeds limit of 20 pixels"):
                read_image(encoded(gradient(6, 6), "WEBP"))


def test_a_gif_frame_larger_than_its_screen_is_refused() -> None:
    frame = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0)
    frame += b"," + struct.pack("<HHHHB", 0, 0, 50_000, 50_000, 0) + b"\x08"
    with pytest.raises(ImageError, match=r"its size \(2500000000 pixels\) exceeds limit"):
        read_image(frame)


def test_the_limit_of_pillow_is_not_changed() -> None:
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ImageError):
        read_image(BOMBS["png"])
    assert before == Image.MAX_IMAGE_PIXELS


def test_a_small_tiff_with_huge_tiles_is_refused() -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in {256: 1, 257: 1, 258: 8, 259: 8, 262: 1, 277: 1}.items():
        tags[tag] = value
    tags[322], tags[323], tags[324], tags[325] = 40_000, 40_000, 8, 1
    stream = io.BytesIO()
    tags.save(stream)
    with pytest.raises(ImageError, match="tiles have 40000 x 40000 = 1,600,000,000 pixels, above"):
        read_image(b"II*\x00\x08\x00\x00\x00" + stream.getvalue()[8:])


@pytest.mark.parametrize("format", [*LOSSLESS, "JPEG", "WEBP"])
def test_a_truncated_file_is_refused(format: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), format)
    with pytest.raises(ImageError, match=r"^Cannot read image of [\d,]+ bytes: .+\.$"):
        read_image(data[: len(data) * 2 // 3])


def test_a_jpeg_that_ends_in_zeros_is_refused_although_the_decoder_accepts_it() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    thumbnail = encoded(Image.fromarray(noise[:16, :16]), "JPEG")
    exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x00\x00\x00\x00\x00\x00" + thumbnail
    for options in ({}, {"exif": exif}):  # a thumbnail has its own end marker
        data = encoded(Image.fromarray(noise), "JPEG", quality=95, **options)
        for kept in (len(data) * 2 // 3, len(data) - 20):
            with pytest.raises(ImageError, match="its end is missing: the file ends in zeros"):
                read_image(data[:kept] + bytes(len(data) - kept))
            assert read_size(data[:kept] + bytes(len(data) - kept)) == (64, 64)
        whole = read_image(data).tobytes()
        for tail in (bytes(4096), b"\xff\xda" + bytes(100), b"trailer" + bytes(16)):
            assert read_image(data + tail).tobytes() == whole


@pytest.mark.parametrize("format", [*LOSSLESS, "JPEG", "WEBP"])
def test_damaged_bytes_raise_only_image_errors(format: str) -> None:
    rng = np.random.default_rng(0)
    data = encoded(gradient(24, 16), format)
    for _ in range(60):
        damaged = bytearray(data)
        for position in rng.integers(0, len(data), 4):
            damaged[position] = rng.integers(256)
        try:
            assert read_image(bytes(damaged), max_pixels=1_000_000).mode == "RGB"
        except ImageError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "it is empty"),
        (b"just some words\n", "it is of no allowed format"),
        (b"P", "it is of no allowed format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is of no allowed format"),
        (b"8BPS\x00\x01" + b"\x00" * 20, "it is of no allowed format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it is of no allowed format"),
        (b"<!DOCTYPE html><title>404</title>", "it is an HTML page: download the image again"),
        (b"<HTML><body>", "it is an HTML page: download the image again"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a git-lfs pointer: run git lfs p"),
        (
            b"\x00\x00\x00\x18ftypheic" + bytes(9),
            "it is of the format HEIC: convert it to one of JP",
        ),
        (
            b"\x00\x00\x00\x1cftypavif" + bytes(9),
            "it is of the format AVIF: convert it to one of JP",
        ),
        (b"\x00\x00\x00\x18ftypmp42" + bytes(9), "it is of no allowed format"),
    ],
)
def test_files_that_are_no_images_are_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=rf"^Cannot read image '.*file\.jpg': {reason}.*\.$"):
        read_image(tmp_path / "file.jpg")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"no\.png': no such file or directory\.$"):
        read_image(tmp_path / "no.png")
    with pytest.raises(ImageError, match=r"': is a directory\.$"):
        read_image(tmp_path)


@contextmanager
def without_privileges() -> Iterator[None]:
    """Drop the privileges of root, which can read any file."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    gradient().save(tmp_path / "secret.png")
    (tmp_path / "secret.png").chmod(0)
    with without_privileges(), pytest.raises(ImageError, match=r"permission denied\.$"):
        read_image(tmp_path / "secret.png")


def test_a_stream_without_a_name_is_called_a_stream() -> None:
    with pytest.raises(ImageError, match=r"^Cannot read image from a stream: it is empty"):
        read_image(io.BytesIO())


def test_the_size_is_read_without_the_pixels() -> None:
    data = encoded(gradient(300, 200))
    assert read_size(data[:60]) == (300, 200)


def test_reading_images_needs_neither_torch_nor_timm() -> None:
    code = "import sys, aoft_deploy.data.images; print({'torch', 'timm'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
