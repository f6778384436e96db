"""Export of a fleet from checkpoints, with a cache between starts."""

from __future__ import annotations

import fcntl
import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from aoft_deploy.artefacts.manifest import manifest_path
from aoft_deploy.cache import cache_folder
from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.checkpoints.names import task_name
from aoft_deploy.errors import CheckpointError
from aoft_deploy.files import file_digest

__all__ = ["export_cached"]

PACKAGES = ("aoft-deploy", "numpy", "onnx", "onnxruntime", "timm", "torch")
"""Packages whose versions are part of the cache key."""


def export_cached(checkpoints: Sequence[Path], folder: Path, weights: Path | None) -> Path:
    """The fleet of some checkpoints; it is exported only if the cache lacks it.

    Args:
        checkpoints: Checkpoints of the tasks.
        folder: Folder for the fleet if there is no cache.
        weights: File with the backbone's weights; None takes timm's own.

    Raises:
        AoftError: A path is no checkpoint, or the tasks cannot share a fleet.
    """
    artefact = (_cache_folder() or folder) / f"{_key(checkpoints, weights)}.onnx"
    with _alone(artefact):
        if not (artefact.is_file() and manifest_path(artefact).is_file()):
            from aoft_deploy.export.fleet import export_fleet  # imports torch

            export_fleet(
                checkpoints,
                artefact,
                backbone=BackboneSource(weights=weights),
                overwrite=True,  # a part may be left from a demo that was killed
                command=["aoft-demo"],
            )
    return artefact


@contextmanager
def _alone(artefact: Path) -> Iterator[None]:
    """Context manager: no other process exports this fleet, which would replace the file in use."""
    with artefact.with_suffix(".lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released with the file, also if the process is killed
        yield


def _cache_folder() -> Path | None:
    """The cache; None if AOFT_CACHE_DIR is empty, or the folder cannot be written."""
    cache = cache_folder()
    if cache is None:
        return None
    folder = cache / "demo"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return None


def _key(checkpoints: Sequence[Path], weights: Path | None) -> str:
    """Hash of everything that determines the fleet's file."""
    for path in checkpoints:
        if not path.is_file():
            raise CheckpointError(f"{path} is neither a checkpoint nor a fleet of aoft-export.")
    parts = [f"{task_name(path)} {file_digest(path)}" for path in checkpoints]
    parts += [file_digest(weights)] if weights else []
    parts += [f"{package} {version(package)}" for package in PACKAGES]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
