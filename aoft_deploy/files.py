"""Files that appear whole or not at all."""

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
    "file_digest",
    "folder_digest",
    "json_text",
    "replacing",
    "settle",
    "writable_folder",
    "write_json",
]

UMASK = os.umask(0)
os.umask(UMASK)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to a temporary file that takes ``path``'s name when the block ends well.

    Args:
        path: The final name; an existing file is replaced only at the end.

    Yields:
        A name in the same folder to write to. It is gone after a failure or an interrupt.

    Raises:
        OutputError: ``path`` is a folder or device, its folder cannot be made or written, or the
            disk is full.
    """
    if path.exists() and not path.is_file():
        raise OutputError(f"Cannot write {path}: it exists and is no file.")
    with writable_folder(path.parent) as folder:
        name = folder / path.name
        try:
            yield name
            settle(name)
            name.replace(path)
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"Cannot write {path}: {error.strerror or error}.") from error


def settle(path: Path) -> None:
    """Force a finished file to disk, with the permissions of any new file.

    Some writers create their files for the owner alone.
    """
    path.chmod(0o666 & ~UMASK)
    with path.open("rb") as written:
        os.fsync(written.fileno())


@contextmanager
def writable_folder(parent: Path) -> Iterator[Path]:
    """A temporary folder inside ``parent`` (made where missing), removed when the block ends.

    Raises:
        OutputError: ``parent`` cannot be made or written.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=".aoft-", dir=parent)
    except OSError as error:
        raise OutputError(f"Cannot write into {parent}: {error.strerror}.") from error
    with temporary as folder:
        yield Path(folder)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all.

    Raises:
        OutputError: It cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(json_text(value, indent=2) + "\n", "utf-8")


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON with readable letters; bytes of a file name that are no text stand as escapes."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder: Path, names: Iterable[str]) -> str:
    """SHA-256 over files of a folder: that of what ``sha256sum NAMES`` prints there.

    Args:
        folder: The folder.
        names: The files that count; their order does not.
    """
    lines = [f"{file_digest(folder / name)}  {name}\n" for name in sorted(names)]
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
