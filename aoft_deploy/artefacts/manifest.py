"""The manifest beside an artefact: read, compared with the artefact, and kept from changing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aoft_deploy.errors import ArtefactError
from aoft_deploy.files import file_digest, folder_digest
from aoft_deploy.texts import one_line

__all__ = [
    "artefact_digest",
    "artefact_files",
    "artefact_size",
    "check_unchanged",
    "manifest_path",
    "read_manifest",
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


def artefact_size(artefact: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(path.stat().st_size for path in artefact_files(artefact))


def artefact_digest(path: Path, names: Iterable[str] | None = None) -> str:
    """SHA-256 of a file, or of the named files of a folder; None names all."""
    if not path.is_dir():
        return file_digest(path)
    if names is None:
        names = [str(file.relative_to(path)) for file in artefact_files(path)]
    return folder_digest(path, names)


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest's entries.

    Raises:
        ArtefactError: It cannot be read, or is no manifest.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} is no JSON file ({one_line(error, 120)}).") from error
    if not isinstance(value, dict) or not {"artefact", "sha256"} & set(value):
        raise ArtefactError(f"{path} is no manifest of aoft-export.")
    return value


def check_unchanged(artefact: Path) -> None:
    """Compare an artefact with the digest in its manifest; one without a manifest passes.

    For a symbolic link, the manifest beside its target counts, or else the one beside the link.

    Raises:
        ArtefactError: It was changed, or it or the manifest cannot be read.
    """
    target = Path(os.path.realpath(artefact))
    beside = [manifest_path(target), manifest_path(artefact)]
    manifest = next((path for path in beside if _exists(path)), None)
    if manifest is None or not _exists(target):
        return
    recorded = read_manifest(manifest).get("sha256")
    try:
        found = artefact_digest(target)
    except OSError as error:
        raise _unreadable(artefact, error) from error
    if recorded != found:
        raise ArtefactError(
            f"{artefact} was changed after its manifest {manifest.name} was written, so it is not "
            "run: export it again."
        )


def signature(artefact: Path) -> tuple[object, ...]:
    """A value that differs once an artefact or its manifest is rewritten, replaced, or readable.

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
    """Context manager: the files must not change between its beginning and its end.

    What is read in several steps is of one version then.

    Raises:
        ArtefactError: A file was written or replaced meanwhile.
    """
    before = _signature(artefact)
    yield
    if _signature(artefact) != before:
        raise ArtefactError(f"{artefact} was changed while it was opened: open it again.")


def _signature(artefact: Path) -> tuple[object, ...] | None:
    """None where the artefact cannot be read; opening it reports the reason."""
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


def _exists(path: Path) -> bool:
    """Whether a path exists, also where the system forbids to look."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        pass
    return True


def _unreadable(path: Path, error: OSError) -> ArtefactError:
    return ArtefactError(f"{path} cannot be read ({error.strerror or error}).")
