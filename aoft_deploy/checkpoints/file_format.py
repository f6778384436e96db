"""A checkpoint as a file: its tensors and the description beside them, checked before use.

safetensors itself checks lengths, offsets, gaps and types. It lets pass two entries of one name, of
which readers may take either, names that are paths, and any number of tensors. Needs neither torch
nor timm.
"""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from aoft_deploy.errors import CheckpointError

__all__ = ["FORMAT", "MOST_TENSORS", "parse_description", "read_tensors"]

FORMAT = 1
"""Version of the layout that this code writes and reads."""

MOST_TENSORS = 10_000
"""Of a checkpoint; a task has some hundreds."""

MOST_HEADER = 16 * 2**20
"""Bytes of names, shapes and description."""

KEYS = {
    "format": int,
    "method": str,
    "settings": dict,
    "backbone": dict,
    "classes": list,
    "preprocessing": dict,
    "training": dict,
}

PATH = re.compile(r"[/\\\0-\x1f\x7f]|\A\.*\Z")
"""What makes a path of a name."""


def read_tensors(path: Path, framework: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors by name, and the texts beside them.

    Args:
        path: A safetensors file of anybody.
        framework: What the tensors shall be of, ``pt`` or ``np``.

    Raises:
        CheckpointError: Something in its header stands there twice, a name is a path, or there are
            too many tensors.
        Exception: It is missing, damaged, or no such file; safetensors raises what the framework
            does, beside its own error.
    """
    _check_header(path)
    with safe_open(path, framework) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def parse_description(path: Path, text: str) -> dict[str, Any]:
    """What stands beside a checkpoint's tensors, every key there and of its type.

    Args:
        path: Where it was found, for the message.
        text: JSON of anybody.

    Raises:
        CheckpointError: It is no such description, or of a newer format.
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
    return found


def _check_header(path: Path) -> None:
    def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
            raise CheckpointError(f"{path} holds {_short(name)} twice: it is not read.")
        return found

    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if length > MOST_HEADER:
            raise SafetensorError(f"its header would take {length} bytes")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=once)
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
                f"{path} holds a tensor {_short(name)}, which is a path and no name of a "
                "parameter: it is not read."
            )


def _short(name: str) -> str:
    return repr(name if len(name) <= 60 else f"{name[:57]}…")
