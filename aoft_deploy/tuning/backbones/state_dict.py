"""Read the tensors of PyTorch and safetensors files without running their code."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from aoft_deploy.errors import BackboneError
from aoft_deploy.file_signatures import file_kind, foreign
from aoft_deploy.texts import one_line

__all__ = ["first_names", "load_torch", "read_state_dict"]

SAFE_TYPES: list[Any] = [
    argparse.Namespace,
    np.dtype,
    np.float64(0).__reduce__()[0],
    *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32)),
]
"""Types in the pickles of training runs that are safe to load: options and NumPy scalars."""

SHOWN_NAMES = 3
"""Names that a message lists before it only counts the rest."""


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """All tensors of a file of backbone weights.

    Returns:
        Tensors by name. The keys of nested dicts are joined with dots.

    Raises:
        BackboneError: The file is of another kind, is damaged, would run code, holds no tensors, or
            is a checkpoint of aoft-train.
    """
    if reason := foreign(path, "safetensors", "torch", "pickle"):
        raise BackboneError(f"{path} {reason}.")
    metadata: Mapping[str, str] = {}
    try:
        if file_kind(path) == "safetensors":
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        else:
            tensors = dict(_flattened(load_torch(path)))
    except Exception as error:  # damaged files make their readers raise many types
        raise BackboneError(_unreadable(path, error)) from error
    if "aoft" in metadata:
        raise BackboneError(
            f"{path} is a checkpoint of aoft-train, which holds no weights of its backbone: give "
            "the backbone's own file."
        )
    if not tensors:
        raise BackboneError(f"{path} holds no tensors.")
    return tensors


def load_torch(path: Path) -> Any:
    """The object in a ``torch.save`` file, with ``weights_only=True``.

    Raises:
        Exception: The file is missing or damaged, or holds types other than ``SAFE_TYPES`` and
            torch's own; torch raises many types.
    """
    with torch.serialization.safe_globals(SAFE_TYPES), path.open("rb") as stream:
        # With a path, torch.load would choose the format by the suffix.
        return torch.load(stream, map_location="cpu", weights_only=True)


def first_names(names: Sequence[str]) -> str:
    """The first few names, and how many more there are, for a message."""
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more


def _flattened(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dicts, each with its keys joined to one dotted name."""
    if isinstance(value, Tensor):
        yield path.removesuffix("."), value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flattened(inner, f"{path}{key}.")


def _unreadable(path: Path, error: Exception) -> str:
    try:
        types = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # not a PyTorch archive
        types = []
    safe = {f"{one.__module__}.{one.__qualname__}" for one in SAFE_TYPES}
    unsafe = [name for name in types if name not in safe]
    if unsafe:
        return (
            f"{path} holds objects of {first_names(unsafe)} beside its tensors, which could run "
            "code: save the model's state_dict() alone."
        )
    reason = one_line(error, 100)
    # torch's own advice is to set weights_only=False, which this package does not offer.
    reason = type(error).__name__ if "weights_only" in str(error) else reason
    return f"{path} cannot be read as weights: it is damaged or of another kind ({reason})."
