"""What an artefact or a manifest holds, as JSON values."""

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
    """Describe an artefact by the exporter that wrote it, or a manifest.

    Args:
        path: A file or folder.

    Returns:
        JSON values; ``kind`` says what it is. None where no exporter wrote it.

    Raises:
        ArtefactError: It is damaged.
    """
    if path.suffix == ".json" and path.is_file():
        return {"kind": "manifest", **read_manifest(path)}
    if not path.exists():
        return None
    from aoft_deploy.artefacts.registry import exporters_of  # the exporters need numpy

    for exporter in exporters_of(path):
        described = exporter.describe(path)
        if described is not None:
            found = {
                "kind": described["kind"],
                "file": str(path),
                "bytes": artefact_size(path),
                "sha256": artefact_digest(path),
                **described,
            }
            return {**found, **_verification(path, found["sha256"])}
    return None


def _verification(path: Path, digest: str) -> dict[str, Any]:
    """What the manifest beside an artefact says, if it is the manifest of these very bytes."""
    manifest = manifest_path(path.resolve() if path.is_dir() else path)
    if not manifest.is_file():
        return {"manifest": "none"}
    values = read_manifest(manifest)
    if values.get("sha256") != digest:
        return {"manifest": "of another file: the artefact was changed after it was verified"}
    return {"manifest": "matches", "verification": values.get("verification")}
