"""A digest of all files of an OpenVINO folder, stored in its graph."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from aoft_deploy.errors import ArtefactError
from aoft_deploy.files import file_digest
from aoft_exporters.openvino.files import MARKER, TASKS, WEIGHTS

__all__ = ["DIGEST", "ZEROS", "check_digest", "seal"]

DIGEST = "files_sha256"
"""Key of the metadata's entry."""

ZEROS = "0" * 64
"""The entry's value while the digest is taken."""


def seal(path: Path) -> None:
    """Store the digest of all files in the graph, which shows a folder that is half overwritten."""
    digest = _digest(path).encode()
    text = (path / MARKER).read_bytes()
    before = f'{DIGEST} value="'.encode()
    assert text.count(before + ZEROS.encode()) == 1
    (path / MARKER).write_bytes(text.replace(before + ZEROS.encode(), before + digest))


def check_digest(path: Path) -> None:
    """Compare a folder's files with its digest; one without a digest passes.

    Raises:
        ArtefactError: They differ, or a file cannot be read.
    """
    try:
        found = re.search(_pattern(), (path / MARKER).read_bytes())
        equal = found is None or found[2].decode() == _digest(path)
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read ({error.strerror or error}).") from error
    if not equal:
        raise ArtefactError(
            f"{path} is half overwritten, still being written, or was changed since aoft-export "
            "wrote it: copy or export it again."
        )


def _digest(path: Path) -> str:
    """SHA-256 of the SHA-256s of all files, that of the graph with zeros in the digest's place."""
    text = re.sub(_pattern(), rb"\g<1>" + ZEROS.encode(), (path / MARKER).read_bytes())
    parts = [hashlib.sha256(text).hexdigest()]
    others = path / WEIGHTS, path / TASKS
    parts += [file_digest(file) for file in others if file.is_file()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _pattern() -> bytes:
    """Regular expression of the digest in the graph's file."""
    return rf'({DIGEST} value=")([0-9a-f]{{64}})'.encode()
