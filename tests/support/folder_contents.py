"""The contents of a folder, to compare them before and after a command."""

from __future__ import annotations

import hashlib
from pathlib import Path

__all__ = ["folder_contents"]


def folder_contents(folder: Path) -> dict[str, str]:
    """Relative path of every file and folder below, with the hash of each file."""
    contents = {}
    for path in sorted(folder.rglob("*")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        contents[str(path.relative_to(folder))] = digest
    return contents
