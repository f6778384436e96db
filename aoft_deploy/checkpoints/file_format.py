"""Read the safetensors file of a checkpoint, and check its header and metadata.

safetensors itself checks lengths, offsets, gaps and types. It accepts duplicate names, of which
readers may use either entry, names that are paths, and any number of tensors. This module refuses
those. It imports neither torch nor timm.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open

from aoft_deploy.classes import Classes
from aoft_deploy.errors import CheckpointError, UnknownNameError
from aoft_deploy.file_signatures import file_kind
from aoft_deploy.path_kinds import CHECKPOINT, described, missing
from aoft_deploy.texts import shortened

__all__ = [
    "FORMAT",
    "MOST_TENSORS",
    "checkpoint_file",
    "parse_description",
    "read_described",
    "read_sizes",
    "read_tensors",
]

Content = TypeVar("Content")

FORMAT = 1
"""Version of the format that this code writes and reads."""

MOST_TENSORS = 10_000
"""Largest number of tensors in a checkpoint; a task has a few hundred."""

MOST_HEADER = 16 * 2**20
"""Largest header in bytes: names, shapes and metadata."""

KEYS = {
    "format": int,
    "method": str,
    "settings": dict,
    "backbone": dict,
    "classes": list,
    "preprocessing": dict,
    "training": dict,
}
"""Required keys of the metadata, with their types."""

PATH = re.compile(r"[/\\\0-\x1f\x7f]|\A\.*\Z")
"""Matches names of tensors that are paths."""


def checkpoint_file(path: Path | str, wanted: str = "checkpoint") -> Path:
    """The checkpoint that a path stands for; any other kind of path is refused by its name.

    Args:
        path: The folder of a training run, which stands for its ``model.ckpt``, or a checkpoint of
            any kind: a file or a PEFT folder.
        wanted: What the message asks for; see ``path_kinds.described``.

    Raises:
        CheckpointError: There is no such path, or it is known to be something else.
    """
    path = Path(path)
    if (path / CHECKPOINT).is_file():
        return path / CHECKPOINT
    if not (path.is_file() or path.is_dir()):
        raise CheckpointError(missing(path))
    if reason := described(path, wanted):
        raise CheckpointError(f"{path} {reason}.")
    return path


def read_tensors(path: Path, framework: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Read the tensors and the metadata of an untrusted safetensors file.

    Args:
        path: The file.
        framework: Type of the returned tensors, ``pt`` or ``np``.

    Returns:
        Tensors by name, and the texts of the metadata.

    Raises:
        CheckpointError: The header contains a name twice, a name is a path, or there are too many
            tensors.
        Exception: The file is missing, damaged or not safetensors. safetensors also raises errors
            of the framework.
    """
    _check_header(path)
    with safe_open(path, framework) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def read_sizes(path: Path) -> tuple[dict[str, int], dict[str, str]]:
    """Numbers of parameters of the tensors, and the metadata, without reading the tensors.

    Raises:
        CheckpointError: As for ``read_tensors``.
        Exception: As for ``read_tensors``.
    """
    _check_header(path)
    with safe_open(path, "np") as file:
        sizes = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}
        return sizes, file.metadata() or {}


def read_described(
    path: Path, read: Callable[[Path], tuple[Content, dict[str, str]]]
) -> tuple[Content, str]:
    """Read a checkpoint; return its content and the text that describes it.

    Args:
        path: The file.
        read: Returns the content that is wanted and the metadata, such as ``read_sizes``.

    Raises:
        CheckpointError: The file cannot be read, or is no checkpoint of this project.
    """
    try:
        content, metadata = read(path)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(_unreadable(path, error)) from error
    if "aoft" not in metadata:
        raise CheckpointError(_unreadable(path, "no metadata"))
    return content, metadata["aoft"]


def parse_description(path: Path, text: str) -> dict[str, Any]:
    """Parse a checkpoint's metadata, and check that every key has its type.

    Args:
        path: The file, for messages.
        text: Untrusted JSON.

    Returns:
        The values; ``classes`` is a ``Classes``, with the activation softmax in files without one.

    Raises:
        CheckpointError: The text is not the metadata of a checkpoint, or has a newer format or an
            unknown activation.
    """
    found: dict[str, Any]
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"The metadata of {path} is no JSON ({error}).") from error
    version = found.get("format") if isinstance(found, dict) else None
    if isinstance(version, int) and version > FORMAT:
        raise CheckpointError(
            f"{path} has format {version}, but this version reads up to {FORMAT}: "
            "upgrade aoft-deploy."
        )
    for key, kind in KEYS.items():
        if not isinstance(found, dict) or not isinstance(found.get(key), kind):
            raise CheckpointError(f"The metadata of {path} lacks {key} as {kind.__name__}.")
    try:
        return {**found, "classes": Classes(map(str, found["classes"]), found.get("activation"))}
    except UnknownNameError as error:
        raise CheckpointError(f"{path}: {error} Upgrade aoft-deploy.") from error


def _unreadable(path: Path, error: object) -> str:
    """The sentence for a file from which no checkpoint could be read."""
    if file_kind(path) in ("torch", "pickle"):
        return (
            f"{path} is a pickle, which could run code: only safetensors checkpoints are read, and "
            "published RLRR .pth files if `backbone` and `weights` give their backbone."
        )
    return f"{path} is no checkpoint, or a truncated one ({error})."


def _check_header(path: Path) -> None:
    def without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        if len(unique := dict(pairs)) < len(pairs):
            ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
            raise CheckpointError(f"{path} holds {shortened(name)} twice: it is not read.")
        return unique

    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if length > MOST_HEADER:
            raise SafetensorError(f"its header would take {length} bytes")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=without_duplicates)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise SafetensorError(f"its header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise SafetensorError("its header is no JSON object")
    names = header.keys() - {"__metadata__"}
    if len(names) > MOST_TENSORS:
        raise CheckpointError(
            f"{path} holds {len(names)} tensors, but at most {MOST_TENSORS} are read."
        )
    for name in names:
        if PATH.search(name):
            raise CheckpointError(
                f"{path} holds a tensor {shortened(name)}, which is a path and no name of a "
                "parameter: it is not read."
            )
