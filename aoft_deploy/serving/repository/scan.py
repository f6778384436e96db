"""What a look at the repository's folder finds, each entry guarded by itself."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from aoft_deploy.artefacts.manifest import signature
from aoft_deploy.artefacts.protocols import TunedExporter
from aoft_deploy.artefacts.registry import exporter_names, get_exporter

__all__ = ["CHECKPOINT", "Sight", "is_name", "printable", "seen"]

CHECKPOINT = ".ckpt"


@dataclass
class Sight:
    """What is there.

    Attributes:
        paths: What may be opened, by the model's name; checkpoints last, since they need a fleet.
        marks: What its files are like, by the same names.
        unseen: Why something that may be opened cannot be looked at, by name.
        passed: Why an entry of the folder is passed over, by the entry's name.
        fault: Why the folder cannot be listed; empty where it can, or where there is none.
    """

    paths: dict[str, Path] = field(default_factory=dict)
    marks: dict[str, object] = field(default_factory=dict)
    unseen: dict[str, str] = field(default_factory=dict)
    passed: dict[str, str] = field(default_factory=dict)
    fault: str = ""


def seen(given: Mapping[str, Path], folder: Path | None) -> Sight:
    """Look at artefacts that were given, and at a folder of others.

    Args:
        given: By name; they come before those of the same names in the folder.
        folder: Of artefacts and checkpoints; None: there is none.
    """
    sight = Sight()
    for name, path in given.items():
        _look(sight, name, path)
    if folder is None:
        return sight
    try:
        entries = os.listdir(folder)
    except OSError as error:
        sight.fault = printable(f"The repository {folder} cannot be read ({error.strerror})")
        return sight
    suffixes = _suffixes()
    manifests = {f"{entry}.json" for entry in entries}
    for entry in sorted(entries, key=lambda name: (name.endswith(CHECKPOINT), name)):
        if entry.startswith(".") or entry in manifests:
            continue
        path = folder / entry
        reason = _passed_over(path, suffixes)
        if not reason and path.stem in {*given, *sight.paths, *sight.unseen}:
            reason = f"another artefact is called {path.stem}"
        if reason:
            sight.passed[entry] = reason
        else:
            _look(sight, path.stem, path)
    return sight


def is_name(name: str) -> bool:
    """Whether a model can be called so in an address, and in JSON."""
    pattern = r"[^/\\\0-\x1f\x7f\ud800-\udfff]{1,200}"
    return re.fullmatch(pattern, name) is not None and name not in (".", "..")


def printable(text: str) -> str:
    """A text in which bytes of a file's name that are no UTF-8 stand as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _look(sight: Sight, name: str, path: Path) -> None:
    try:
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a pipe, which may never be written to
            sight.passed[path.name] = "it is neither a file nor a folder"
            return
        sight.marks[name] = signature(path)
        sight.paths[name] = path
    except FileNotFoundError:
        if path.is_symlink():
            sight.passed[path.name] = "it is a link to nothing"
    except OSError as error:
        sight.unseen[name] = printable(f"{path.name} cannot be looked at ({error.strerror}).")


def _passed_over(path: Path, suffixes: frozenset[str]) -> str:
    """Why an entry is no artefact; empty where it may be one."""
    if path.suffix not in suffixes:
        if _is_triton(path):
            return (
                "it is a model of a Triton repository: aoft-serve takes folders of single artefacts"
            )
        return f"its suffix is none of {', '.join(sorted(suffixes))}"
    if not is_name(path.stem):
        return "its name cannot stand in an address: rename it"
    return ""


def _is_triton(path: Path) -> bool:
    """Whether it is a folder with a configuration or a version, as Triton lays models out."""
    try:
        names = os.listdir(path)
    except OSError:
        return False
    return any(name == "config.pbtxt" or name.isdecimal() for name in names)


def _suffixes() -> frozenset[str]:
    """Of files that may be served: those of engines that need no backbone, and checkpoints."""
    exporters = [get_exporter(name) for name in exporter_names()]
    merged = {e.SUFFIX for e in exporters if not isinstance(e, TunedExporter)}
    return frozenset(merged - {".safetensors"} | {CHECKPOINT})
