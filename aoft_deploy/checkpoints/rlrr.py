"""Read checkpoints of the published RLRR code (github.com/zstarN70/RLRR).

They are pickled dicts of tensors with the names of the released ``models/networks.py``. Each tensor
maps to one of ours; shapes differ by axes of length one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import CheckpointError
from aoft_deploy.file_signatures import foreign
from aoft_deploy.tuning.backbones.state_dict import load_torch

__all__ = ["is_torch_file", "published_preprocessing", "read_published"]

WORDS = {
    "attn.query": "attn.qkv.q",
    "attn.key": "attn.qkv.k",
    "attn.value": "attn.qkv.v",
    "attn.out": "attn.proj",
    "ffn.fc1": "mlp.fc1",
    "ffn.fc2": "mlp.fc2",
    "attn_norm": "norm1",
    "ffn_norm": "norm2",
    "scale_col": "scale_in",
    "scale_line": "scale_out",
    "shift_bias": "shift",
}

RULES = {
    r"head\.(weight|bias)": "head.head.{0}",
    r"transformer\.embeddings\.ssf_(scale|shift)_patch": "update.patch_embed.proj.{0}",
    r"transformer\.encoder\.ssf_(scale|shift)_enc_norm": "update.norm.{0}",
    r"transformer\.encoder\.layer\.(\d+)\.ssf_(scale|shift)_(attn_norm|ffn_norm)": (
        "update.blocks.{0}.{2}.{1}"
    ),
    r"transformer\.encoder\.layer\.(\d+)\.((?:attn|ffn)\.\w+)\.(scale_col|scale_line|shift_bias)": (
        "update.blocks.{0}.{1}.{2}"
    ),
}
"""Pattern of a published name → our name, its groups translated by ``WORDS``."""


def is_torch_file(path: Path) -> bool:
    """Whether a file starts like those of ``torch.save``: a zip archive or a bare pickle."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(2)
    return start == b"PK" or start[:1] == b"\x80"


def read_published(path: Path) -> dict[str, Tensor]:
    """Read a file's tensors, under the names of our checkpoints.

    Raises:
        CheckpointError: The file is damaged, would run code, or holds other names.
    """
    if reason := foreign(path, "torch", "pickle"):
        raise CheckpointError(f"{path} {reason}.")
    try:
        state = load_torch(path)
    except Exception as error:  # damaged pickles make torch raise many types
        raise CheckpointError(
            f"{path} is damaged or would run code, and is not read ({type(error).__name__})."
        ) from error
    if not isinstance(state, Mapping) or "head.bias" not in state:
        raise CheckpointError(f"{path} is no published RLRR checkpoint: it has no head.bias.")
    for name, value in state.items():
        dense = isinstance(value, Tensor) and value.layout is torch.strided
        if not dense or not value.is_floating_point():
            raise CheckpointError(
                f"{path} is no published RLRR checkpoint: {name} is not a tensor of floats."
            )
    return {_renamed(path, str(name)): _reshaped(path, str(name), t) for name, t in state.items()}


def published_preprocessing(size: int | tuple[int, int]) -> Preprocessing:
    """The released code's evaluation transform for VTAB: a resize to the input size, no crop."""
    half = (0.5, 0.5, 0.5)
    return Preprocessing(size, crop_pct=1.0, mean=half, std=half, crop_mode="squash")


def _renamed(path: Path, name: str) -> str:
    for pattern, ours in RULES.items():
        match = re.fullmatch(pattern, name)
        if match:
            return ours.format(*(WORDS.get(group, group) for group in match.groups()))
    raise CheckpointError(f"{path} is no published RLRR checkpoint: it has no place for {name}.")


def _reshaped(path: Path, name: str, tensor: Tensor) -> Tensor:
    """Scales as rows (1, features), shifts as vectors, the classifier unchanged."""
    if name.startswith("head."):
        return tensor.float()
    if tensor.numel() != max(tensor.shape, default=1):
        raise CheckpointError(
            f"{path} is no published RLRR checkpoint: {name} has shape {tuple(tensor.shape)}, but "
            "must be a vector."
        )
    if name.endswith(("scale_col", "scale_line")):
        return tensor.reshape(1, -1).float()
    return tensor.reshape(-1).float()
