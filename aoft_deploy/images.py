"""Reading one image file that a stranger sent: upright 8-bit RGB, or one sentence why not.

Only formats of the list below are decoded, only after their header has been checked against a
limit of pixels, and only whole files. Colour profiles are ignored, as the training of timm's
backbones ignored them.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

# Importing a plugin enters its format in Image.OPEN.
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

__all__ = ["IMAGE_SUFFIXES", "image_files", "read_image", "read_size", "walk_images"]

IMAGE_SUFFIXES = frozenset(
    ".bmp .gif .jfif .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split()
)
"""Suffixes, in lower case, of the files that an image folder is searched for."""

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

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

    Transparent parts turn white, 16-bit channels keep their high byte, the EXIF orientation is
    applied, and of several frames or pages the first is taken. Colour profiles are ignored.
    Memory stays at about 20 bytes per pixel or less, beside the file itself.

    Args:
        source: A path, a file's content, or a seekable binary stream, read from its start.
        max_pixels: Largest width x height that is decoded; larger is refused from the header.
        least: Decode a JPEG at a half, a quarter or an eighth of its size while both sides keep
            that many pixels; several times faster. None: always whole.

    Returns:
        A loaded image of mode ``RGB`` that holds no open file.

    Raises:
        ImageError: The file cannot be opened, is of no allowed format, has too many pixels, is
            truncated or damaged, or holds 32-bit integers or floats, whose white is undefined.
    """
    with _opened(source, max_pixels) as image:
        if least is not None:
            image.draft(None, (least, least))  # does nothing in other formats
        image.load()
        return _upright(_to_rgb(image), image)


def read_size(source: Path | bytes | BinaryIO, *, max_pixels: int = 64_000_000) -> tuple[int, int]:
    """Read an image's width and height from its header, without decoding its pixels.

    Args:
        source: As for :func:`read_image`.
        max_pixels: As for :func:`read_image`.

    Returns:
        Width and height in pixels, as stored: the EXIF orientation is not applied.

    Raises:
        ImageError: As for :func:`read_image`, as far as the header tells.
    """
    with _opened(source, max_pixels) as image:
        return image.size


def walk_images(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Images below a folder, in an order that the file system does not influence.

    Args:
        folder: Where to look.
        seen: Folders already entered, so that circular links come to an end; it is added to.
    """
    if folder.resolve() in seen:
        return
    seen.add(folder.resolve())
    with os.scandir(folder) as entries:
        found = sorted((e.name, e.is_dir()) for e in entries if not e.name.startswith("."))
    for name, is_folder in found:
        if is_folder:
            yield from walk_images(folder / name, seen)
        elif Path(name).suffix.lower() in IMAGE_SUFFIXES:
            yield folder / name


def image_files(sources: Sequence[Path]) -> list[Path]:
    """Files, and in place of each folder the images below it.

    Raises:
        ImageError: A folder holds no images.
    """
    files = []
    for source in sources:
        found = list(walk_images(source, set())) if source.is_dir() else [source]
        if not found:
            raise ImageError(f"There are no images in the folder {source}.")
        files += found
    return files


@contextmanager
def _opened(source: Path | bytes | BinaryIO, max_pixels: int) -> Iterator[ImageFile.ImageFile]:
    """Open and check the header; every failure, in the ``with`` block too, is an ImageError."""
    try:
        with _stream(source) as stream:
            image = _identified(stream)
            _check_pixels(image, max_pixels)
            yield image
    # Decoders meet hostile bytes and raise whatever their parsing happens to trip over.
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

    That check depends on a global limit, and silencing its warning is not thread-safe.
    """
    stream.seek(0)
    prefix = stream.read(16)
    if not prefix:
        raise ValueError("it is empty")
    for name in _FORMATS:
        parse, accepts = Image.OPEN[name]
        # A plugin whose library is missing answers with a sentence instead of True.
        if accepts is not None and accepts(prefix) is True:
            stream.seek(0)
            return parse(stream, "")
    raise ValueError(f"it is of no allowed format ({', '.join(_FORMATS)})")


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


def _to_rgb(image: ImageFile.ImageFile) -> Image.Image:
    # Pillow holds 16-bit PGM files in mode I, scaled to 0..65535.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(
            "it holds signed or 32-bit numbers, whose white is undefined: "
            "save it with 8 or 16 bits per channel"
        )
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(colours, mask=colours)
        return white
    return image.convert("RGB")


def _upright(rgb: Image.Image, image: ImageFile.ImageFile) -> Image.Image:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # Damaged metadata are no reason to refuse sound pixels.
        return rgb
    method = _TO_UPRIGHT.get(orientation)
    return rgb if method is None else rgb.transpose(method)


def _name(source: Path | bytes | BinaryIO) -> str:
    if isinstance(source, Path):
        return repr(str(source))
    if isinstance(source, bytes):
        return f"of {len(source):,} bytes"
    name = getattr(source, "name", None)
    return repr(name) if name else "from a stream"


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return str(error).partition(", could")[0].replace("Image size", "its size")
    return " ".join(str(error).split()).rstrip(" .") or type(error).__name__
