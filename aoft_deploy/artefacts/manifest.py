"""The manifest beside an artefact, whether it is still of it, and whether files change."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from aoft_deploy.errors import CheckpointError
from aoft_deploy.files import file_digest, folder_digest

__all__ = [
    "artefact_digest",
    "artefact_files",
    "check_unchanged",
    "manifest_path",
    "signature",
    "unchanged",
]


def manifest_path(artefact: Path) -> Path:
    """Where an artefact's manifest stands: ``<artefact>.json``."""
    return artefact.with_name(artefact.name + ".json")


def artefact_files(artefact: Path) -> list[Path]:
    """The file itself, or all files of a folder."""
    if not artefact.is_dir():
        return [artefact]
    return sorted(path for path in artefact.rglob("*") if path.is_file())


def artefact_digest(path: Path, names: Iterable[str] | None = None) -> str:
    """SHA-256 of a file, or of the named files of a folder; None names all."""
    if not path.is_dir():
        return file_digest(path)
    if names is None:
        names = [str(file.relative_to(path)) for file in artefact_files(path)]
    return folder_digest(path, names)


def check_unchanged(artefact: Path) -> None:
    """Whether an artefact is the one that its manifest is of; one without a manifest passes.

    The manifest of a symbolic link's target counts, or else the one beside the link.

    Raises:
        CheckpointError: It was changed, or it or the manifest cannot be read.
    """
    whole = Path(os.path.realpath(artefact))
    beside = [manifest_path(whole), manifest_path(artefact)]
    manifest = next((path for path in beside if _is_there(path)), None)
    if manifest is None or not _is_there(whole):
        return
    try:
        recorded = json.loads(manifest.read_text("utf-8"))["sha256"]
    except OSError as error:
        raise _unreadable(manifest, error) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{manifest} is no manifest of aoft-export.") from error
    try:
        found = artefact_digest(whole)
    except OSError as error:
        raise _unreadable(artefact, error) from error
    if recorded != found:
        raise CheckpointError(
            f"{artefact} was changed after its manifest {manifest.name} was written: "
            "export it again; it is not run."
        )


def signature(artefact: Path) -> tuple[object, ...]:
    """What changes when an artefact or its manifest is written anew, replaced, or opened to others.

    Returns:
        Name, size in bytes, times of content and of permissions in ns, and inode of every file.

    Raises:
        FileNotFoundError: There is no artefact.
        OSError: It cannot be looked at.
    """
    files = [artefact, *_below(artefact)] if artefact.is_dir() else [artefact]
    found = [_mark(file.name, file.stat()) for file in files]
    for manifest in {manifest_path(artefact), manifest_path(Path(os.path.realpath(artefact)))}:
        try:
            found.append(_mark(manifest.name, manifest.stat()))
        except FileNotFoundError:
            pass
    return tuple(sorted(found))


@contextmanager
def unchanged(artefact: Path) -> Iterator[None]:
    """See that the files within the block are the same from its beginning to its end.

    What is read in several steps is of one version then.

    Raises:
        CheckpointError: A file was written or replaced meanwhile.
    """
    before = _signature(artefact)
    yield
    if _signature(artefact) != before:
        raise CheckpointError(f"{artefact} was changed while it was opened: open it again.")


def _signature(artefact: Path) -> tuple[object, ...] | None:
    """None where the artefact is not there or cannot be looked at: whoever opens it tells why."""
    try:
        return signature(artefact)
    except OSError:
        return None


def _mark(name: str, found: os.stat_result) -> tuple[str, int, int, int, int]:
    return name, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _below(folder: Path) -> Iterator[Path]:
    """Everything in a folder, at any depth.

    Raises:
        OSError: A folder cannot be listed.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            yield folder / entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from _below(folder / entry.name)


def _is_there(path: Path) -> bool:
    """Whether there is something, also where that cannot be looked at."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        pass
    return True


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read ({error.strerror or error}).")
