"""The digest of an OpenVINO folder's files, stored in its graph, and changes of the metadata."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from aoft_deploy.errors import ArtefactError
from aoft_deploy.files import file_digest
from aoft_exporters.openvino.files import MARKER, TASKS, WEIGHTS

__all__ = ["DIGEST", "ZEROS", "check_digest", "restate", "seal"]

DIGEST = "files_sha256"
"""Metadata key of the digest."""

ZEROS = "0" * 64
"""Value of the metadata entry while the digest is computed."""


def seal(path: Path) -> None:
    """Store the digest of all files in the graph, so that a partial overwrite is detected."""
    digest = _digest(path).encode()
    text = (path / MARKER).read_bytes()
    before = f'{DIGEST} value="'.encode()
    assert text.count(before + ZEROS.encode()) == 1
    (path / MARKER).write_bytes(text.replace(before + ZEROS.encode(), before + digest))


def restate(path: Path, name: str, value: str) -> None:
    """Change a metadata entry of a sealed folder, and seal it again.

    Args:
        path: The folder.
        name: Key of an entry that exists.
        value: Its new value, without characters that XML escapes.
    """
    text = re.sub(_pattern(), rb"\g<1>" + ZEROS.encode(), (path / MARKER).read_bytes())
    text, count = re.subn(rf'({name} value=")[^"]*'.encode(), rb"\g<1>" + value.encode(), text)
    assert count == 1
    (path / MARKER).write_bytes(text)
    seal(path)


def check_digest(path: Path) -> None:
    """Compare a folder's files with its digest. A folder without a digest passes.

    Raises:
        ArtefactError: The digest differs, or a file cannot be read.
    """
    try:
        stored = re.search(_pattern(), (path / MARKER).read_bytes())
        equal = stored is None or stored[2].decode() == _digest(path)
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read ({error.strerror or error}).") from error
    if not equal:
        raise ArtefactError(
            f"{path} is half overwritten, still being written, or was changed since aoft-export "
            "wrote it: copy or export it again."
        )


def _digest(path: Path) -> str:
    """SHA-256 of the SHA-256s of all files; the graph's has zeros in place of the digest."""
    text = re.sub(_pattern(), rb"\g<1>" + ZEROS.encode(), (path / MARKER).read_bytes())
    parts = [hashlib.sha256(text).hexdigest()]
    other_files = path / WEIGHTS, path / TASKS
    parts += [file_digest(file) for file in other_files if file.is_file()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _pattern() -> bytes:
    """Regular expression for the digest in the graph's XML."""
    return rf'({DIGEST} value=")([0-9a-f]{{64}})'.encode()
