"""Image files in folders: which files are images, and a stable order to list them in."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

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

__all__ = ["IMAGE_SUFFIXES", "image_files", "is_system_folder", "describe_skipped", "walk_images"]


IMAGE_SUFFIXES = frozenset(
    ".apng .bmp .gif .jfif .jif .jpe .jpeg .jpg .mpo .pbm .pgm .pjp .pjpeg .png .pnm .ppm .tif "
    ".tiff .webp".split()
)
"""Suffixes, in lower case, of the files that an image folder is searched for."""


_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a")
"""First bytes that no other kind of file has; WebP's are not in one piece."""


_SYSTEM_FOLDERS = frozenset(
    ("$recycle.bin", "@eadir", "__macosx", "__pycache__", "lost+found", "system volume information")
)
"""Folders, in lower case, that operating systems and archivers leave beside the data."""


def is_system_folder(name: str) -> bool:
    """Whether a folder is hidden, or made by an operating system or an archiver."""
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


def walk_images(
    folder: Path, seen: set[Path], others: Counter[str] | None = None
) -> Iterator[Path]:
    """Images below a folder, in an order that the file system does not influence.

    A file is an image by its suffix, or, where it has none, by its first bytes. A link that leads
    nowhere counts by its suffix too, so that reading it says what is wrong. Hidden files, system
    folders and what is no regular file are passed over.

    Args:
        folder: Where to look.
        seen: Folders already entered, so that circular links come to an end; it is added to.
        others: Counts the files that are passed over, by suffix in lower case.

    Raises:
        OSError: A folder cannot be listed.
    """
    if folder.resolve() in seen:
        return
    seen.add(folder.resolve())
    with os.scandir(folder) as entries:
        found = sorted(
            (e.name, e.is_dir(), e.is_file()) for e in entries if not e.name.startswith(".")
        )
    for name, is_folder, is_file in found:
        path = folder / name
        if is_folder:
            if not is_system_folder(name):
                yield from walk_images(path, seen, others)
        elif is_file or (path.is_symlink() and not path.exists()):
            suffix = path.suffix.lower()
            if suffix in IMAGE_SUFFIXES or (not suffix and _is_signed(path)):
                yield path
            elif others is not None:
                others[suffix] += 1


def _is_signed(path: Path) -> bool:
    """Whether a file's first bytes are those of an image, and of nothing else."""
    try:
        with path.open("rb") as stream:
            prefix = stream.read(16)
    except OSError:
        return False
    return prefix.startswith(_SIGNATURES) or prefix[:4] + prefix[8:12] == b"RIFFWEBP"


def describe_skipped(others: Counter[str]) -> str:
    """A phrase that counts what ``walk_images`` passed over; empty where it was nothing."""
    if not others:
        return ""
    kinds = ", ".join(
        f"{suffix or 'no suffix'} {count:,}" for suffix, count in others.most_common()
    )
    files = "1 file" if others.total() == 1 else f"{others.total():,} files"
    return f"{files} of other suffixes passed over ({kinds})"


def image_files(sources: Sequence[Path], others: Counter[str] | None = None) -> list[Path]:
    """Files, and in place of each folder the images below it.

    Args:
        sources: Files and folders.
        others: Counts the files of folders that are passed over, by suffix in lower case.

    Raises:
        ImageError: A folder holds no images, or cannot be listed.
    """
    files = []
    for source in sources:
        other = Counter[str]()
        try:
            found = list(walk_images(source, set(), other)) if source.is_dir() else [source]
        except OSError as error:
            reason = error.strerror or error
            raise ImageError(f"Folder {str(source)!r} cannot be listed: {reason}.") from error
        if not found:
            told = describe_skipped(other)
            raise ImageError(
                f"There are no images in the folder {source}{f': {told}' if told else ''}."
            )
        files += found
        if others is not None:
            others.update(other)
    return files
