"""Image files in folders: which files are images, and a stable order to list them in."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from aoft_deploy.errors import ImageError
from aoft_deploy.texts import natural_order

__all__ = ["IMAGE_SUFFIXES", "describe_skipped", "image_files", "is_system_folder", "walk_images"]

IMAGE_SUFFIXES = frozenset(
    ".apng .bmp .gif .jfif .jif .jpe .jpeg .jpg .mpo .pbm .pgm .pjp .pjpeg .png .pnm .ppm .tif "
    ".tiff .webp".split()
)
"""Suffixes of image files, in lower case."""

_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a")
"""First bytes that only image files have; those of WebP are not contiguous."""

_SYSTEM_FOLDERS = frozenset(
    ("$recycle.bin", "@eadir", "__macosx", "__pycache__", "lost+found", "system volume information")
)
"""Folders, in lower case, that operating systems and archivers create."""


def image_files(sources: Sequence[Path], skipped: Counter[str] | None = None) -> list[Path]:
    """Files as given, and the images below each folder and of each pattern, in natural order.

    Args:
        sources: Files, folders, and patterns such as ``photos/*.jpg`` or ``photos/**``.
        skipped: Receives the number of skipped files in the folders, by lower-case suffix.

    Raises:
        ImageError: A folder holds no images or cannot be listed, or a pattern matches none.
    """
    files = []
    for source in sources:
        skipped_here = Counter[str]()
        try:
            found = _images(source, skipped_here)
        except OSError as error:
            reason = error.strerror or error
            raise ImageError(f"Folder {str(source)!r} cannot be listed: {reason}.") from error
        if not found:
            note = describe_skipped(skipped_here)
            where = "in the folder" if source.is_dir() else "that match"
            raise ImageError(f"There are no images {where} {source}{f': {note}' if note else ''}.")
        files += found
        if skipped is not None:
            skipped.update(skipped_here)
    return files


def _images(source: Path, skipped: Counter[str]) -> list[Path]:
    """The file itself, or the images of a folder or a pattern in natural order.

    Raises:
        OSError: A folder cannot be listed.
    """
    if source.is_dir():
        found = list(walk_images(source, set(), skipped))
    elif os.path.lexists(source) or not glob.has_magic(str(source)):
        return [source]
    else:
        found = list(_matching(str(source), skipped))
    return sorted(found, key=lambda path: [natural_order(part) for part in path.parts])


def _matching(pattern: str, skipped: Counter[str]) -> Iterator[Path]:
    """Images that match a pattern, and those below the folders that match it."""
    for path in map(Path, glob.iglob(pattern, recursive=True)):
        if not path.is_dir():
            if _is_image(path, skipped):
                yield path
        elif "**" not in pattern:  # which also matches all files below a folder
            yield from walk_images(path, set(), skipped)


def walk_images(
    folder: Path, seen: set[Path], skipped: Counter[str] | None = None
) -> Iterator[Path]:
    """Images below a folder, sorted by name in each folder.

    A file with a suffix is an image if the suffix is known; a file without one is an image if its
    first bytes are. A broken link counts by its suffix, so that reading it reports the fault.
    Hidden files, system folders and everything that is no regular file are ignored.

    Args:
        folder: Where to look.
        seen: Folders that were entered before, so that circular links end; each new one is added.
        skipped: Receives the number of files that are no images, by lower-case suffix.

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
                yield from walk_images(path, seen, skipped)
        elif is_file or (path.is_symlink() and not path.exists()):
            if _is_image(path, skipped):
                yield path


def describe_skipped(skipped: Counter[str]) -> str:
    """Phrase for a message that counts skipped files by suffix; empty if there are none."""
    if not skipped:
        return ""
    counts = ", ".join(
        f"{suffix or 'no suffix'} {count:,}" for suffix, count in skipped.most_common()
    )
    total = skipped.total()
    files = "1 file with another suffix" if total == 1 else f"{total:,} files with other suffixes"
    return f"{files} skipped ({counts})"


def is_system_folder(name: str) -> bool:
    """Whether a folder is hidden, or created by an operating system or an archiver."""
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


def _is_image(path: Path, skipped: Counter[str] | None) -> bool:
    """Whether a file is an image, by its suffix or else its first bytes; others are counted."""
    suffix = path.suffix.lower()
    is_image = suffix in IMAGE_SUFFIXES or (not suffix and _has_image_signature(path))
    if skipped is not None and not is_image:
        skipped[suffix] += 1
    return is_image


def _has_image_signature(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            prefix = stream.read(16)
    except OSError:
        return False
    return prefix.startswith(_SIGNATURES) or prefix[:4] + prefix[8:12] == b"RIFFWEBP"
