"""Checkpoints with changed metadata."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["with_changed_metadata"]


def with_changed_metadata(
    source: Path, target: Path, change: Callable[[dict[str, Any]], object]
) -> Path:
    """Copy a checkpoint and change its metadata.

    Args:
        source: The checkpoint.
        target: The copy.
        change: A function that changes the metadata in place.

    Returns:
        The copy.
    """
    data = source.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = json.loads(header["__metadata__"]["aoft"])
    change(metadata)
    header["__metadata__"]["aoft"] = json.dumps(metadata)
    text = json.dumps(header).encode()
    target.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return target
