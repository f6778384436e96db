"""Publish an artefact together with its manifest."""

from __future__ import annotations

import platform
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from aoft_deploy.artefacts.exporter import Exporter
from aoft_deploy.artefacts.manifest import (
    SEAL,
    artefact_digest,
    artefact_files,
    artefact_size,
    manifest_path,
)
from aoft_deploy.artefacts.verification import Report
from aoft_deploy.errors import OutputError
from aoft_deploy.export.gpu_verification import GpuVerification
from aoft_deploy.files import json_text, settle

__all__ = ["Exported", "provenance", "publish", "versions"]

PACKAGES = tuple(
    "aoft-deploy torch timm onnx onnxscript onnxruntime onnxruntime-gpu openvino nncf tensorrt "
    "tensorrt-rtx numpy".split()
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
        left_in_float: Names of the products that stay in a higher precision for accuracy: in
            float32, or for fp8 in fp16.
        gpu: What a GPU of this machine verified; None if artefacts of the exporter run on one kind
            of device only.
    """

    path: Path
    manifest: Path
    report: Report
    size: int
    device: str | None = "CPU"
    arithmetic: str = ""
    left_in_float: tuple[str, ...] = ()
    gpu: GpuVerification | None = None


def provenance(draft: Path, exporter: Exporter, command: Sequence[str]) -> dict[str, Any]:
    """Manifest entries for the artefact's content, and for the export that made it."""
    digest = exporter.stated_digest(draft) if exporter.stated_digest else None
    return {
        "artefact": draft.name,
        "sha256": artefact_digest(draft),
        **({} if digest is None else {SEAL: digest}),
        "bytes": artefact_size(draft),
        "exporter": exporter.name,
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

    What exists at these paths is replaced. An artefact never exists without its manifest.

    Raises:
        OutputError: A file cannot be written or renamed.
    """
    manifest = manifest_path(output)
    draft_manifest = draft.with_name(manifest.name)
    try:
        draft_manifest.write_text(json_text(contents, indent=2) + "\n", "utf-8")
        for path in (*artefact_files(draft), draft_manifest):
            settle(path)
        with _restoring(output, manifest, draft.parent):
            draft_manifest.replace(manifest)
            draft.replace(output)
    except OSError as error:
        raise OutputError(f"Cannot write {output}: {error.strerror or error}.") from error


@contextmanager
def _restoring(output: Path, manifest: Path, scratch: Path) -> Iterator[None]:
    """Context manager: restore the previous artefact and manifest after a failure.

    A folder cannot be replaced by a rename, so it is moved away first, with its manifest.
    """
    old, old_manifest = scratch / f"old-{output.name}", scratch / f"old-{manifest.name}"
    if manifest.exists():
        shutil.copy2(manifest, old_manifest)
    try:
        if output.is_dir():
            output.rename(old)
        yield
    except BaseException:
        manifest.unlink(missing_ok=True)
        for kept, path in ((old, output), (old_manifest, manifest)):
            if kept.exists():
                kept.rename(path)
        raise
