"""Reading an untrusted image file as upright 8-bit RGB, or refusing it with one sentence.

Only the formats below are decoded, only complete files, and only after the header was checked
against a limit of pixels. Colour profiles are ignored, as in the training of timm's backbones.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

# Importing a plugin registers its format in Image.OPEN.
from PIL import (  # noqa: F401
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from aoft_deploy.errors import ImageError

__all__ = ["read_image", "read_size", "to_rgb", "upright"]

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


_WRONG_FILES = (
    (b"<!doctype html", "it is an HTML page: download the image again"),
    (b"<html", "it is an HTML page: download the image again"),
    (b"version https://git-lfs", "it is a git-lfs pointer: run git lfs pull"),
)
"""First bytes, in lower case, of files that are often saved in place of an image; with advice."""

_ZEROS = 16  # zero bytes at the end of a JPEG that make us look for its end marker

_HEIF_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"), "HEIC"),
}

_EXIF_ORIENTATION = 0x0112
_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(
    source: Path | bytes | BinaryIO, *, max_pixels: int = 64_000_000, least: int | None = None
) -> Image.Image:
    """Read an image as upright 8-bit RGB.

    Transparent parts become white, 16-bit channels keep their high byte, the EXIF orientation is
    applied, and only the first of several frames or pages is read. Colour profiles are ignored.
    Memory use is at most about 20 bytes per pixel, plus the file itself.

    Args:
        source: A path, the content of a file, or a seekable binary stream, read from its start.
        max_pixels: Largest width x height; a larger image is refused before it is decoded.
        least: Decode a JPEG at a half, a quarter or an eighth of its size while both sides have at
            least this many pixels, which is much faster; ``max_pixels`` then limits the decoded
            size. None decodes at full size.

    Returns:
        A loaded image of mode ``RGB`` that holds no open file.

    Raises:
        ImageError: The file cannot be opened, has a format that is not allowed, has too many
            pixels, is truncated or damaged, or holds 32-bit integers or floats, which have no
            defined white.
    """
    with _opened(source, max_pixels if least is None else 64 * max_pixels) as (image, stream):
        if least is not None:
            image.draft(None, (least, least))  # does nothing in other formats
            _check_pixels(image, max_pixels)
        layout, low = _layout(image), _low_bytes(image, stream)
        image.load()
        if image.format in ("JPEG", "MPO"):
            _check_end(stream)
        return upright(to_rgb(image, _transparent(image, layout, low)), image)


def read_size(source: Path | bytes | BinaryIO, *, max_pixels: int = 64_000_000) -> tuple[int, int]:
    """Read an image's width and height from its header, without decoding its pixels.

    Args:
        source: As for :func:`read_image`.
        max_pixels: As for :func:`read_image`.

    Returns:
        Width and height in pixels, as stored: the EXIF orientation is not applied.

    Raises:
        ImageError: As for :func:`read_image`, except for faults of the pixel data.
    """
    with _opened(source, max_pixels) as (image, _):
        return image.size


@contextmanager
def _opened(
    source: Path | bytes | BinaryIO, max_pixels: int
) -> Iterator[tuple[ImageFile.ImageFile, BinaryIO]]:
    """Open the file and check its header; every error, also in the block, becomes an ImageError."""
    try:
        with _stream(source) as stream:
            image = _identified(stream)
            _check_pixels(image, max_pixels)
            yield image, stream
    # On hostile bytes, decoders raise exceptions of any type.
    except Exception as error:
        raise ImageError(f"Cannot read image {_name(source)}: {_reason(error)}.") from error


@contextmanager
def _stream(source: Path | bytes | BinaryIO) -> Iterator[BinaryIO]:
    if isinstance(source, Path):
        with source.open("rb") as stream:
            yield stream
    elif isinstance(source, bytes):
        yield io.BytesIO(source)
    else:
        yield source


def _identified(stream: BinaryIO) -> ImageFile.ImageFile:
    """Parse the header as ``Image.open`` does, but without its check of the pixel count.

    That check uses a global limit, and its warning cannot be silenced in a thread-safe way.
    """
    stream.seek(0)
    prefix = stream.read(16)
    if not prefix:
        raise ValueError("it is empty")
    for name in _FORMATS:
        parse, accepts = Image.OPEN[name]
        # A plugin whose library is missing returns a message instead of True.
        if accepts is not None and accepts(prefix) is True:
            stream.seek(0)
            return parse(stream, "")
    raise ValueError(
        _known_wrong_file(prefix) or f"it is of no allowed format ({', '.join(_FORMATS)})"
    )


def _known_wrong_file(prefix: bytes) -> str | None:
    """What a file is that was saved in place of an image, and what to do about it."""
    for signature, advice in _WRONG_FILES:
        if prefix.lower().startswith(signature[: len(prefix)]) and len(prefix) > 4:
            return advice
    if prefix[4:8] == b"ftyp" and prefix[8:12] in _HEIF_BRANDS:
        name = _HEIF_BRANDS[prefix[8:12]]
        return f"it is of the format {name}: convert it to one of {', '.join(_FORMATS)}"
    return None


def _check_end(stream: BinaryIO) -> None:
    """Refuse a JPEG that ends in zeros after an interrupted copy; the decoder accepts it."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(size - _ZEROS, 0))
    if any(stream.read(_ZEROS)):
        return
    stream.seek(0)
    data = stream.read()
    at = 2  # skip the segments before the pixels: a thumbnail in a segment has an end marker too
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != b"\xda":
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    if data.find(b"\xff\xd9", at) < 0:
        raise ValueError("its end is missing: the file ends in zeros")


def _check_pixels(image: ImageFile.ImageFile, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(
            f"it has {width} x {height} = {width * height:,} pixels, "
            f"above the limit of {max_pixels:,}: shrink it first"
        )
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        width = image.tag_v2.get(TiffImagePlugin.TILEWIDTH, 1)
        height = image.tag_v2.get(TiffImagePlugin.TILELENGTH, 1)
        if width * height > max_pixels:
            raise ValueError(
                f"its tiles have {width} x {height} = {width * height:,} pixels, "
                f"above the limit of {max_pixels:,}: save it without tiles"
            )


def _low_bytes(image: ImageFile.ImageFile, stream: BinaryIO) -> NDArray[np.uint8] | None:
    """Low bytes of a 16-bit RGB PNG with a transparent colour; None for any other image.

    Pillow keeps only the high bytes, which are not enough to compare a pixel with that colour.
    Decoding the file again with the other byte order gives the low bytes.
    """
    if _layout(image) != "RGB;16B" or "transparency" not in image.info:
        return None
    position = stream.tell()
    stream.seek(0)
    again = _identified(io.BytesIO(stream.read()))
    stream.seek(position)
    again.tile = [tile._replace(args="RGB;16L") for tile in again.tile]
    return np.asarray(again)


def _layout(image: ImageFile.ImageFile) -> str | None:
    """Pillow's name for the channel layout of a PNG that is not loaded yet; None for others."""
    layout = image.tile[0].args if image.format == "PNG" and image.tile else None
    return layout if isinstance(layout, str) else None


def _transparent(
    image: ImageFile.ImageFile, layout: str | None, low: NDArray[np.uint8] | None
) -> NDArray[np.bool_] | None:
    """Mask of a PNG's transparent colour, in the cases that Pillow gets wrong.

    Pillow compares the colour with pixels that it has already scaled (2 and 4 bits) or reduced to
    their high byte (16-bit RGB), and ignores transparency in 16-bit grey.

    Returns:
        (height, width), or None if there is no such colour or Pillow handles it correctly.
    """
    colour = image.info.get("transparency")
    if colour is None:
        return None
    if low is not None:
        value = np.asarray(colour)
        return np.asarray(((np.asarray(image) == value >> 8) & (low == (value & 255))).all(-1))
    scale = {"L;2": 85, "L;4": 17, "I;16B": 1}.get(layout or "")
    return None if scale is None else np.asarray(np.asarray(image) == colour * scale)


def to_rgb(image: Image.Image, transparent: NDArray[np.bool_] | None) -> Image.Image:
    """An image as RGB; white where ``transparent`` is true, or where the image says so if None.

    Raises:
        ValueError: It holds 32-bit integers or floats.
    """
    # Pillow reads 16-bit PGM files in mode I, scaled to 0..65535.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        rgb = Image.fromarray(grey).convert("RGB")
    elif image.mode in ("I", "F"):
        raise ValueError(
            "it holds signed or 32-bit values, which have no defined white: "
            "save it with 8 or 16 bits per channel"
        )
    elif transparent is None and image.has_transparency_data:
        colours = image.convert("RGBA")
        rgb = Image.new("RGB", image.size, "white")
        rgb.paste(colours, mask=colours)
    else:
        rgb = image.convert("RGB")
    if transparent is not None:
        rgb.paste("white", mask=Image.fromarray(transparent))
    return rgb


def upright(rgb: Image.Image, image: Image.Image) -> Image.Image:
    """``rgb``, turned by the EXIF orientation of ``image``."""
    try:
        method = _TO_UPRIGHT.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # damaged metadata do not matter if the pixels are sound
        return rgb
    if method is not None:
        rgb = rgb.transpose(method)
        rgb.info.clear()  # its EXIF data hold the orientation before the turn
    return rgb


def _name(source: Path | bytes | BinaryIO) -> str:
    if isinstance(source, Path):
        return repr(str(source))
    if isinstance(source, bytes):
        return f"of {len(source):,} bytes"
    return repr(source.name) if getattr(source, "name", None) else "from a stream"


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return str(error).partition(", could")[0].replace("Image size", "its size")
    return " ".join(str(error).split()).rstrip(" .") or type(error).__name__
