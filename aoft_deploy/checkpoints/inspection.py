"""What a checkpoint holds, as JSON values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aoft_deploy.checkpoints.checkpoint import read_checkpoint
from aoft_deploy.checkpoints.rlrr import is_torch_file, read_published
from aoft_deploy.errors import CheckpointError
from aoft_deploy.files import file_digest

__all__ = ["describe_checkpoint", "describe_tensors"]


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """Describe a ``model.ckpt`` or a released RLRR .pth.

    Args:
        path: The file.

    Returns:
        JSON values; ``kind`` says what the file is.

    Raises:
        CheckpointError: The file is missing, damaged, or neither of these.
    """
    if path.is_dir():
        raise CheckpointError(
            f"{path} is a folder that holds no artefact and no PEFT LoRA adapter."
        )
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}.")
    file = {"file": str(path), "bytes": path.stat().st_size, "sha256": file_digest(path)}
    if is_torch_file(path):
        tensors = read_published(path)
        return {"kind": "published RLRR checkpoint", **file, **describe_tensors(tensors)}
    checkpoint = read_checkpoint(path)
    return {
        "kind": "checkpoint",
        **file,
        "method": checkpoint.method,
        "settings": dict(checkpoint.settings),
        "backbone": checkpoint.backbone.to_dict(),
        "classes": list(checkpoint.classes),
        "activation": checkpoint.classes.activation,
        "preprocessing": checkpoint.preprocessing.to_dict(),
        "training": dict(checkpoint.training),
        **describe_tensors(checkpoint.tensors),
    }


def describe_tensors(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """How many trained parameters there are, and at which sites."""
    sites: Counter[str] = Counter()
    for name, tensor in tensors.items():
        owner = name.removeprefix("update.").rpartition(".")[0]
        sites["classifier" if name.startswith("head.") else owner] += tensor.numel()
    return {
        "trained_numbers": sum(sites.values()),
        "update_numbers": sum(sites.values()) - sites["classifier"],
        "sites": dict(sites),
    }
