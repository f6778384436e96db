"""Check the output path of an artefact, and publish the artefact together with its manifest."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from aoft_deploy.artefacts.exporter import Exporter
from aoft_deploy.artefacts.manifest import (
    artefact_digest,
    artefact_files,
    artefact_size,
    manifest_path,
)
from aoft_deploy.artefacts.verification import Report
from aoft_deploy.errors import OutputError
from aoft_deploy.files import json_text, settle

__all__ = ["Exported", "check_output", "provenance", "publish", "versions"]

PACKAGES = tuple(
    "aoft-deploy torch timm onnx onnxscript onnxruntime openvino nncf tensorrt tensorrt-rtx "
    "numpy".split()
)


@dataclass(frozen=True)
class Exported:
    """A finished export.

    Attributes:
        path: The artefact, a file or a folder.
        manifest: The manifest beside the artefact.
        report: The verification results.
        size: Size of the artefact in bytes.
        device: Name of the device that verified the artefact; None if this machine cannot run it in
            its precision, so that its graph or an emulation was verified instead.
        arithmetic: Description of the precision, runtime and device of the verification.
        left_in_float: Names of the products that stay in float32 for accuracy.
    """

    path: Path
    manifest: Path
    report: Report
    size: int
    device: str | None = "CPU"
    arithmetic: str = ""
    left_in_float: tuple[str, ...] = ()


def check_output(exporter: Exporter, output: Path, inputs: Sequence[Path]) -> None:
    """Refuse an invalid output path.

    Args:
        exporter: The exporter, which writes a file or a folder.
        output: Path of the artefact. An existing file is replaced; a folder must be new or empty.
        inputs: Files that the export reads. They must not be overwritten.

    Raises:
        OutputError: The path is invalid.
    """
    if exporter.marker:
        _check_folder(output)
    else:
        _check_file(output, exporter.suffix, inputs)


def _check_file(output: Path, suffix: str, inputs: Sequence[Path]) -> None:
    if output.is_dir():
        raise OutputError(f"{output} is a folder: give a file's name with `output`.")
    if output.suffix != suffix:
        raise OutputError(f"{output} does not end in {suffix}: give such a name with `output`.")
    for path in (output, manifest_path(output)):
        if path.exists() and not path.is_file():
            raise OutputError(f"{path} exists and is no file: give another name with `output`.")
        if any(path.exists() and source.exists() and path.samefile(source) for source in inputs):
            raise OutputError(
                f"{path} is an input of this export: give another name with `output`."
            )


def _check_folder(output: Path) -> None:
    if output.name in ("", "..") or output.is_symlink():
        raise OutputError(f"{output} cannot become a folder: give a new name with `output`.")
    manifest = manifest_path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output} exists and is no empty folder: give a new name with `output`.")
    if manifest.exists() and not manifest.is_file():
        raise OutputError(f"{manifest} exists and is no file: give another name with `output`.")


def provenance(draft: Path, to: str, command: Sequence[str]) -> dict[str, Any]:
    """Manifest entries for the artefact's content, and for the export that made it."""
    return {
        "artefact": draft.name,
        "sha256": artefact_digest(draft),
        "bytes": artefact_size(draft),
        "exporter": to,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(command),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of those ``PACKAGES`` that are installed."""
    result = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            result[package] = version(package)
        except PackageNotFoundError:
            continue
    return result


def publish(draft: Path, output: Path, contents: Mapping[str, Any]) -> None:
    """Write the manifest, and rename artefact and manifest to their final paths, or neither.

    Raises:
        OutputError: A file cannot be written or renamed.
    """
    draft_manifest = draft.with_name(manifest_path(output).name)
    try:
        draft_manifest.write_text(json_text(contents, indent=2) + "\n", "utf-8")
        _rename(draft, output, draft_manifest)
    except OSError as error:
        raise OutputError(f"Cannot write {output}: {error.strerror or error}.") from error


def _rename(draft: Path, output: Path, draft_manifest: Path) -> None:
    """Rename the manifest first, so that an artefact never exists without it."""
    manifest = manifest_path(output)
    for path in (*artefact_files(draft), draft_manifest):
        settle(path)
    draft_manifest.replace(manifest)
    try:
        draft.replace(output)
    except BaseException:
        manifest.unlink()
        raise
