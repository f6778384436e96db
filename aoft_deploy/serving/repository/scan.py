"""A scan of the repository's folder. A faulty entry does not affect the others."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from aoft_deploy.artefacts.manifest import signature
from aoft_deploy.artefacts.registry import exporters
from aoft_deploy.serving.repository.names import is_name, printable

__all__ = ["CHECKPOINT", "Scan", "check_readable", "scan"]

CHECKPOINT = ".ckpt"


@dataclass
class Scan:
    """What a scan found.

    Attributes:
        paths: Artefacts and checkpoints by model name; checkpoints last, since they need a fleet.
        marks: The state of their files, by the same names.
        unreadable: Why files cannot be examined, by model name.
        skipped: Why entries of the folder are skipped, by entry name.
        fault: Why the folder cannot be listed; empty if it can, or if there is none.
    """

    paths: dict[str, Path] = field(default_factory=dict)
    marks: dict[str, object] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    fault: str = ""


def scan(given: Mapping[str, Path], folder: Path | None) -> Scan:
    """Examine the artefacts that were given, and those of a folder.

    Args:
        given: Artefacts by name; they take precedence over the folder's of the same names.
        folder: A folder of artefacts and checkpoints; None if there is none.
    """
    found = Scan()
    for name, path in given.items():
        _examine(found, name, path)
    if folder is None:
        return found
    try:
        entries = os.listdir(folder)
    except OSError as error:
        found.fault = printable(f"The repository {folder} cannot be read ({error.strerror})")
        return found
    suffixes = _suffixes()
    manifests = {f"{entry}.json" for entry in entries}
    for entry in sorted(entries, key=lambda name: (name.endswith(CHECKPOINT), name)):
        if entry.startswith(".") or entry in manifests:
            continue
        path = folder / entry
        reason = _skip_reason(path, suffixes)
        if not reason and path.stem in {*given, *found.paths, *found.unreadable}:
            reason = f"another artefact is called {path.stem}"
        if reason:
            found.skipped[entry] = reason
        else:
            _examine(found, path.stem, path)
    return found


def check_readable(path: Path) -> None:
    """Try to open a file, since readers do not report missing permissions as such.

    Raises:
        OSError: The file cannot be opened.
    """
    if path.is_file():
        path.open("rb").close()


def _examine(found: Scan, name: str, path: Path) -> None:
    try:
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # reading a pipe could block forever
            found.skipped[path.name] = "it is neither a file nor a folder"
            return
        found.marks[name] = signature(path)
        found.paths[name] = path
    except FileNotFoundError:
        if path.is_symlink():
            found.skipped[path.name] = "it is a broken link"
    except OSError as error:
        found.unreadable[name] = printable(f"{path.name} cannot be examined ({error.strerror}).")


def _skip_reason(path: Path, suffixes: frozenset[str]) -> str:
    """Why an entry is not an artefact; empty if it may be one."""
    if path.suffix not in suffixes:
        if _is_triton(path):
            return (
                "it is a model of a Triton repository: aoft-serve takes folders of single artefacts"
            )
        return f"its suffix is none of {', '.join(sorted(suffixes))}"
    if not is_name(path.stem):
        return "its name cannot be part of a URL: rename it"
    return ""


def _is_triton(path: Path) -> bool:
    """Whether a folder has a configuration or a version, as the models of Triton do."""
    try:
        names = os.listdir(path)
    except OSError:
        return False
    return any(name == "config.pbtxt" or name.isdecimal() for name in names)


def _suffixes() -> frozenset[str]:
    """Suffixes of checkpoints, and of artefacts that need no backbone."""
    merged = {e.suffix for e in exporters() if e.updates is None}
    return frozenset(merged - {".safetensors"} | {CHECKPOINT})
