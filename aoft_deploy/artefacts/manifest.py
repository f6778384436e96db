"""The manifest beside an artefact: reading it, and detecting changes of the artefact."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aoft_deploy.errors import ArtefactError
from aoft_deploy.files import file_digest, folder_digest
from aoft_deploy.texts import one_line

__all__ = [
    "SEAL",
    "artefact_digest",
    "artefact_files",
    "artefact_size",
    "check_unchanged",
    "manifest_path",
    "read_manifest",
    "signature",
    "unchanged",
    "verified_batches",
]

SEAL = "seal"
"""Manifest entry for the digest that an artefact states of its own content."""


def manifest_path(artefact: Path) -> Path:
    """Path of an artefact's manifest: ``<artefact>.json``."""
    return artefact.with_name(artefact.name + ".json")


def artefact_files(artefact: Path) -> list[Path]:
    """The artefact itself if it is a file, or all files in the folder and its subfolders."""
    if not artefact.is_dir():
        return [artefact]
    return sorted(path for path in artefact.rglob("*") if path.is_file())


def artefact_size(artefact: Path) -> int:
    """Size in bytes of a file, or of all files of a folder."""
    return sum(path.stat().st_size for path in artefact_files(artefact))


def artefact_digest(path: Path, names: Iterable[str] | None = None) -> str:
    """SHA-256 of a file, or of the named files of a folder; None means all files."""
    if not path.is_dir():
        return file_digest(path)
    if names is None:
        names = [str(file.relative_to(path)) for file in artefact_files(path)]
    return folder_digest(path, names)


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest's entries.

    Raises:
        ArtefactError: The file cannot be read, or is not a manifest.
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


def check_unchanged(
    artefact: Path, stated_digest: Callable[[Path], str | None] | None = None
) -> None:
    """Compare an artefact with the digest in its manifest. An artefact without one passes.

    For a symbolic link, the manifest beside the target comes before the one beside the link.

    Args:
        artefact: The file or folder.
        stated_digest: Reads the digest that the artefact states of its content; see ``Exporter``.
            If the manifest has it too, both are compared, and the content is not read: the caller
            must compare it with the digest. Otherwise, all of the artefact is hashed.

    Raises:
        ArtefactError: The artefact was changed, or a file cannot be read.
    """
    target, manifest = Path(os.path.realpath(artefact)), _manifest(artefact)
    if manifest is None or not _exists(target):
        return
    entries = read_manifest(manifest)
    if stated_digest is not None and SEAL in entries:
        same = entries[SEAL] == stated_digest(target)
    else:
        try:
            same = entries.get("sha256") == artefact_digest(target)
        except OSError as error:
            raise _unreadable(artefact, error) from error
    if not same:
        raise ArtefactError(
            f"{artefact} was changed after its manifest {manifest.name} was written, so it is not "
            "run: export it again."
        )


def verified_batches(artefact: Path) -> tuple[int, ...]:
    """Batch sizes at which the artefact was verified; none without a manifest that says so.

    For a symbolic link, the manifest is that of ``check_unchanged``.

    Raises:
        ArtefactError: The manifest cannot be read.
    """
    manifest = _manifest(artefact)
    verification = None if manifest is None else read_manifest(manifest).get("verification")
    sizes = verification.get("batch_sizes") if isinstance(verification, dict) else None
    return tuple(n for n in sizes if isinstance(n, int)) if isinstance(sizes, list) else ()


def signature(artefact: Path) -> tuple[object, ...]:
    """A value that changes when the artefact or its manifest, or their permissions, change.

    Returns:
        Name, size in bytes, mtime and ctime in ns, and inode of every file.

    Raises:
        FileNotFoundError: The artefact does not exist.
        OSError: A file or folder cannot be accessed.
    """
    files = [artefact, *_below(artefact)] if artefact.is_dir() else [artefact]
    marks = [_mark(file.name, file.stat()) for file in files]
    for manifest in {manifest_path(artefact), manifest_path(Path(os.path.realpath(artefact)))}:
        try:
            marks.append(_mark(manifest.name, manifest.stat()))
        except FileNotFoundError:
            pass
    return tuple(sorted(marks))


@contextmanager
def unchanged(artefact: Path) -> Iterator[None]:
    """Context manager: ensure that an artefact does not change while it is read in several steps.

    Raises:
        ArtefactError: A file was written or replaced inside the block.
    """
    before = _signature(artefact)
    yield
    if _signature(artefact) != before:
        raise ArtefactError(f"{artefact} was changed while it was opened: open it again.")


def _signature(artefact: Path) -> tuple[object, ...] | None:
    """The signature, or None if the artefact cannot be read: opening it reports the reason."""
    try:
        return signature(artefact)
    except OSError:
        return None


def _mark(name: str, stat: os.stat_result) -> tuple[str, int, int, int, int]:
    return name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def _below(folder: Path) -> Iterator[Path]:
    """All files and folders below a folder, at any depth.

    Raises:
        OSError: A folder cannot be listed.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            yield folder / entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from _below(folder / entry.name)


def _manifest(artefact: Path) -> Path | None:
    """The manifest beside an artefact's target, or else beside the link to it, if there is one."""
    candidates = [manifest_path(Path(os.path.realpath(artefact))), manifest_path(artefact)]
    return next((path for path in candidates if _exists(path)), None)


def _exists(path: Path) -> bool:
    """Whether a path exists; True if access to it is denied."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        pass
    return True


def _unreadable(path: Path, error: OSError) -> ArtefactError:
    return ArtefactError(f"{path} cannot be read ({error.strerror or error}).")
