"""Images in the list files of a benchmark: their paths, and checks of the lists."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from aoft_deploy.errors import DataError

__all__ = ["Entry", "check_once", "check_size", "image_path", "read_text"]

Entry = tuple[str, Path, int]
"""Place in a list (for messages), file, and label of an image."""


def read_text(path: Path) -> str:
    """Text of a list file.

    Raises:
        DataError: It is missing, cannot be read or is not UTF-8.
    """
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise DataError(f"Cannot read the list {path}: {reason}.") from error


def image_path(folder: Path, name: str, where: str) -> Path:
    """The file of an image that a list names relative to a folder.

    Args:
        folder: The folder.
        name: Relative path with forward slashes.
        where: The place in the list, for messages.

    Raises:
        DataError: The path leads out of the folder, or is not a file.
    """
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise DataError(f"{where} names {name!r}, which leads out of {folder}: use a path inside.")
    path = folder / relative
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # a name that no file system allows
        is_file = False
    if not is_file:
        raise DataError(f"{where} names {name!r}, but {folder} has no such file: add it.")
    return path


def check_once(entries: Iterable[Entry]) -> None:
    """Refuse an image that is listed twice, in one list or in two.

    Raises:
        DataError: An image is listed twice; the message names both places.
    """
    places: dict[Path, str] = {}
    for where, path, _ in entries:
        if path in places:
            raise DataError(
                f"{where} names {path.name!r}, which {places[path]} already lists: "
                "list each image once."
            )
        places[path] = where


def check_size(path: Path | str, count: int, expected: int) -> None:
    """Refuse a list with another length than in the benchmark.

    Raises:
        DataError: The lengths differ.
    """
    if count != expected:
        raise DataError(
            f"{path} lists {count:,} images instead of the benchmark's {expected:,}: complete it, "
            "or accept other sizes with `any_size=True`."
        )
