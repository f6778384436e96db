"""Check what the paths of the command are before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aoft_deploy.artefacts.manifest import manifest_path, read_manifest
from aoft_deploy.errors import ArtefactError, CheckpointError
from aoft_deploy.path_kinds import CHECKPOINT, described, missing

__all__ = ["check_paths"]

ARTEFACTS = (".onnx", ".xml")
"""Suffixes of artefacts that are files."""


def check_paths(paths: Sequence[Path]) -> None:
    """Check that each path can be a fleet or a checkpoint, by its first bytes and its manifest.

    Raises:
        CheckpointError: A path does not exist, is of another format, or is a merged model.
    """
    for path in paths:
        if not path.exists():
            raise CheckpointError(missing(path))
        if path.suffix in ARTEFACTS or manifest_path(path).is_file():
            _check_artefact(path)
        elif reason := described(path, "checkpoint"):
            if not (path.is_dir() and described(path, "artefact") == ""):
                raise CheckpointError(f"{path} {reason}.")


def _check_artefact(path: Path) -> None:
    """Refuse an artefact that is no fleet, and say which checkpoint to give instead."""
    if path.suffix in ARTEFACTS and (reason := described(path, "artefact")):
        raise CheckpointError(f"{path} {reason}.")
    if not manifest_path(path).is_file():
        return
    try:
        manifest = read_manifest(manifest_path(path))
    except ArtefactError:
        return  # the fleet's own check says what is wrong
    if "tasks" in manifest:
        return
    raise CheckpointError(
        f"{path} is the merged model of one task, and no fleet: {_advice(path, manifest)}."
    )


def _advice(path: Path, manifest: dict[str, Any]) -> str:
    """Which checkpoint to give instead of a merged model."""
    source = manifest.get("checkpoint")
    name = source.get("name") if isinstance(source, dict) else None
    names = [Path(name).name] if isinstance(name, str) else []
    for candidate in (*names, path.with_suffix(".ckpt").name, CHECKPOINT):
        beside = path.parent / candidate
        if beside.is_file():
            return f"give the checkpoint beside it, {beside}"
    return f"give the {names[0] if names else CHECKPOINT} that it was made from"
