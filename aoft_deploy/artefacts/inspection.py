"""Describe an artefact or a manifest as JSON values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aoft_deploy.artefacts.manifest import (
    artefact_digest,
    artefact_size,
    manifest_path,
    read_manifest,
)

__all__ = ["describe_artefact"]


def describe_artefact(path: Path) -> dict[str, Any] | None:
    """Describe an artefact or a manifest.

    Args:
        path: A file or folder.

    Returns:
        JSON values, of which ``kind`` names the kind of file. None if no exporter wrote it.

    Raises:
        ArtefactError: The file is damaged.
    """
    if path.suffix == ".json" and path.is_file():
        return {"kind": "manifest", **read_manifest(path)}
    if not path.exists():
        return None
    from aoft_deploy.artefacts.registry import exporters_of  # the exporters need numpy

    for exporter in exporters_of(path):
        described = exporter.describe(path)
        if described is not None:
            entries = {
                "kind": described["kind"],
                "file": str(path),
                "bytes": artefact_size(path),
                "sha256": artefact_digest(path),
                **described,
            }
            return {**entries, **_verification(path, entries["sha256"])}
    return None


def _verification(path: Path, digest: str) -> dict[str, Any]:
    """Verification results from the manifest beside an artefact, if its digest matches."""
    manifest = manifest_path(path.resolve() if path.is_dir() else path)
    if not manifest.is_file():
        return {"manifest": "none"}
    values = read_manifest(manifest)
    if values.get("sha256") != digest:
        return {"manifest": "of another file: the artefact was changed after it was verified"}
    return {"manifest": "matches", "verification": values.get("verification")}
