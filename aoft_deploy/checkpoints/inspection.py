"""What a checkpoint or a folder of training runs holds, as JSON values. Imports no torch.

Only published RLRR files are pickles, which torch reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aoft_deploy.checkpoints.file_format import (
    checkpoint_file,
    parse_description,
    read_described,
    read_sizes,
)
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.file_signatures import file_kind
from aoft_deploy.files import file_digest
from aoft_deploy.path_kinds import CHECKPOINT, run_folders

__all__ = ["describe_checkpoint", "describe_sizes"]


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """Describe a ``model.ckpt``, the folder of a training run or of several, or a released .pth.

    Args:
        path: The file or folder.

    Returns:
        JSON values; ``kind`` says what the file is.

    Raises:
        CheckpointError: The file is missing, damaged, or none of these.
    """
    runs = () if (path / CHECKPOINT).is_file() or not path.is_dir() else tuple(run_folders(path))
    if runs:
        return _describe_runs(path, runs)
    path = checkpoint_file(path, "any")
    file = {"file": str(path), "bytes": path.stat().st_size, "sha256": file_digest(path)}
    if file_kind(path) in ("torch", "pickle"):
        from aoft_deploy.checkpoints.rlrr import read_published

        sizes = {name: tensor.numel() for name, tensor in read_published(path).items()}
        return {"kind": "published RLRR checkpoint", **file, **describe_sizes(sizes)}
    sizes, text = read_described(path, read_sizes)
    found = parse_description(path, text)
    del found["format"]
    found |= {"classes": list(found["classes"]), "activation": found["classes"].activation}
    found["preprocessing"] = Preprocessing.from_dict(found["preprocessing"]).to_dict()
    return {"kind": "checkpoint", **file, **found, **describe_sizes(sizes)}


def describe_sizes(sizes: Mapping[str, int]) -> dict[str, Any]:
    """How many trained parameters there are, and at which sites."""
    sites: Counter[str] = Counter()
    for name, size in sizes.items():
        owner = name.removeprefix("update.").rpartition(".")[0]
        sites["classifier" if name.startswith("head.") else owner] += size
    return {
        "trained_parameters": sum(sites.values()),
        "update_parameters": sum(sites.values()) - sites["classifier"],
        "sites": dict(sites),
    }


def _describe_runs(folder: Path, runs: Sequence[Path]) -> dict[str, Any]:
    """One entry for each training run in a folder.

    Raises:
        CheckpointError: A checkpoint is damaged.
    """
    described = {str(run.relative_to(folder)): describe_checkpoint(run) for run in runs}
    return {
        "kind": f"folder of {len(runs)} training run{'s'[: len(runs) > 1]}",
        "file": str(folder),
        "runs": {
            name: {
                "method": run["method"],
                "backbone": run["backbone"].get("name"),
                "classes": len(run["classes"]),
                **{k: v for k, v in run["training"].items() if k.endswith("_accuracy")},
            }
            for name, run in described.items()
        },
    }
