"""Atomic writing of files, JSON text, and digests."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aoft_deploy.errors import OutputError

__all__ = [
    "check_new",
    "file_digest",
    "folder_digest",
    "json_text",
    "replacing",
    "settle",
    "taken",
    "writable_folder",
    "write_json",
]

UMASK = os.umask(0)
os.umask(UMASK)


def check_new(path: Path, overwrite: bool, parameter: str) -> None:
    """Refuse the path of a result before the work begins: an existing one, or one without a folder.

    Args:
        path: The file to write.
        overwrite: Accept an existing file.
        parameter: Name of the parameter that gives the path, for messages.

    Raises:
        OutputError: The path cannot be used.
    """
    if not path.parent.is_dir():
        raise OutputError(f"There is no folder {path.parent}: give another `{parameter}`.")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path} exists and is no file: give another `{parameter}`.")
    if path.exists() and not overwrite:
        raise taken(path, parameter)


def taken(path: Path, parameter: str) -> OutputError:
    """The error for a result whose path exists; arguments as for ``check_new``."""
    return OutputError(
        f"{path} exists: give another `{parameter}`, or replace it with `overwrite=True`."
    )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Context manager: write to a temporary file, and rename it to ``path`` on success.

    Args:
        path: The final path. An existing file is replaced only at the end.

    Yields:
        The temporary path, on the same file system. It is deleted after a failure or interrupt.

    Raises:
        OutputError: ``path`` is a folder or device, its folder cannot be created or written to, or
            the disk is full.
    """
    if path.exists() and not path.is_file():
        raise OutputError(f"Cannot write {path}: it exists and is no file.")
    with writable_folder(path.parent) as folder:
        temporary = folder / path.name
        try:
            yield temporary
            settle(temporary)
            temporary.replace(path)
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"Cannot write {path}: {error.strerror or error}.") from error


def settle(path: Path) -> None:
    """Flush a finished file to disk, and give it the default permissions of new files.

    Some libraries create files that only the owner can read.
    """
    path.chmod(0o666 & ~UMASK)
    with path.open("rb") as written:
        os.fsync(written.fileno())


@contextmanager
def writable_folder(parent: Path) -> Iterator[Path]:
    """Context manager: a temporary folder inside ``parent``, removed at the end.

    ``parent`` is created if it is missing.

    Raises:
        OutputError: ``parent`` cannot be created or written to.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=".aoft-", dir=parent)
    except OSError as error:
        raise OutputError(f"Cannot write into {parent}: {error.strerror}.") from error
    with temporary as folder:
        yield Path(folder)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically.

    Raises:
        OutputError: The file cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(json_text(value, indent=2) + "\n", "utf-8")


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON text with non-ASCII letters unescaped. Invalid UTF-8 in file names is escaped."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder: Path, names: Iterable[str]) -> str:
    """SHA-256 of the output of ``sha256sum NAMES`` in a folder, with the names sorted.

    Args:
        folder: The folder.
        names: Paths of files, relative to the folder.
    """
    lines = [f"{file_digest(folder / name)}  {name}\n" for name in sorted(names)]
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
