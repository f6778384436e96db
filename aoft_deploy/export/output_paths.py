"""Paths of artefacts: default names, and which existing files an export may replace."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from aoft_deploy.artefacts.exporter import Exporter
from aoft_deploy.artefacts.manifest import check_unchanged, manifest_path, read_manifest
from aoft_deploy.errors import ArtefactError, OutputError
from aoft_deploy.files import taken

__all__ = ["artefact_path", "beside", "check_output"]


def beside(checkpoint: Path) -> Path:
    """Default path of an artefact beside a checkpoint or PEFT folder, without its suffix."""
    named = checkpoint if checkpoint.name.strip(".") else checkpoint.resolve()  # "." or ".."
    return named.parent / named.stem


def artefact_path(path: Path, exporter: Exporter, precision: str) -> Path:
    """Add precision and suffix to a path: ``model.onnx`` in fp32, else ``model-int8.onnx``."""
    suffix = f"{'' if precision == 'fp32' else f'-{precision}'}{exporter.suffix}"
    return path.parent / f"{path.name}{suffix}"


def check_output(
    exporter: Exporter, output: Path, inputs: Sequence[Path], overwrite: bool = False
) -> None:
    """Refuse an invalid path, and an existing artefact or manifest unless it may be replaced.

    An empty folder counts as absent if the artefact is a folder.

    Args:
        exporter: The exporter, which writes a file or a folder.
        output: Path of the artefact.
        inputs: Files and folders that the export reads. They are never replaced.
        overwrite: Replace an existing file, or a folder that is an unchanged artefact of this
            exporter, and its manifest.

    Raises:
        OutputError: The path is invalid, or something exists that may not be replaced.
    """
    manifest = manifest_path(output)
    _check_name(exporter, output)
    _check_writable(output.parent)
    _check_inputs(output, manifest, inputs)
    if manifest.exists() and not manifest.is_file():
        raise OutputError(f"{manifest} exists and is no file: give another name with `output`.")
    existing = [path for path in (output, manifest) if _exists(path, exporter)]
    if not existing:
        return
    if exporter.marker and output in existing:
        _check_folder(exporter, output)
    if not overwrite:
        raise taken(existing[0], "output")
    try:
        if manifest in existing:
            read_manifest(manifest)
        if exporter.marker and output in existing:
            check_unchanged(output)
    except ArtefactError as error:
        raise OutputError(
            f"{output} or its manifest was changed, or not written by aoft-export ({error}): move "
            "both away, or give another `output`."
        ) from error


def _check_name(exporter: Exporter, output: Path) -> None:
    if exporter.marker:
        if output.name in ("", "..") or output.is_symlink():
            raise OutputError(f"{output} cannot become a folder: give a new name with `output`.")
        return
    if output.is_dir():
        raise OutputError(f"{output} is a folder: give a file's name with `output`.")
    if output.suffix != exporter.suffix:
        raise OutputError(
            f"{output} does not end in {exporter.suffix}: give such a name with `output`."
        )
    if output.exists() and not output.is_file():
        raise OutputError(f"{output} exists and is no file: give another name with `output`.")


def _check_writable(folder: Path) -> None:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    effective = os.access in os.supports_effective_ids
    if existing.is_dir() and not os.access(existing, os.W_OK | os.X_OK, effective_ids=effective):
        raise OutputError(f"Cannot write into {folder}: {os.strerror(errno.EACCES)}.")
    if not existing.is_dir():
        raise OutputError(f"Cannot write into {folder}: {existing} is no folder.")


def _check_inputs(output: Path, manifest: Path, inputs: Sequence[Path]) -> None:
    """Refuse to replace an input, or a folder that contains one."""
    for path in (output, manifest):
        target = path.resolve()
        for source in (source.resolve() for source in inputs if path.exists() and source.exists()):
            if path.samefile(source) or target in source.parents:
                raise OutputError(
                    f"{path} is an input of this export: give another name with `output`."
                )


def _exists(path: Path, exporter: Exporter) -> bool:
    """Whether a path is taken, even by a broken symbolic link."""
    is_empty_folder = path.is_dir() and not path.is_symlink() and not any(path.iterdir())
    return os.path.lexists(path) and not (exporter.marker and is_empty_folder)


def _check_folder(exporter: Exporter, output: Path) -> None:
    """Refuse a folder that is not an artefact of the exporter, with its manifest."""
    if not (output / exporter.marker).is_file() or not manifest_path(output).is_file():
        raise OutputError(
            f"{output} exists and is no {exporter.name} artefact with a manifest: give another "
            "`output`."
        )
