"""The manifest beside an artefact, and whether it is still of it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from aoft_deploy.errors import CheckpointError
from aoft_deploy.files import file_digest, folder_digest

__all__ = ["artefact_digest", "artefact_files", "check_unchanged", "manifest_path"]


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

    Raises:
        CheckpointError: It was changed, or the manifest cannot be read.
    """
    whole = artefact.resolve()
    manifest = manifest_path(whole)
    if not manifest.is_file() or not whole.exists():
        return
    try:
        recorded = json.loads(manifest.read_text("utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{manifest} is no manifest of aoft-export.") from error
    if recorded != artefact_digest(whole):
        raise CheckpointError(
            f"{artefact} was changed after its manifest {manifest.name} was written: "
            "export it again; it is not run."
        )
