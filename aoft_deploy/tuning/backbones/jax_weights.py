"""Weights in the JAX layout (.npz), as Google's and the papers' codes publish them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from aoft_deploy.errors import BackboneError
from aoft_deploy.tuning.sites.classifier import classifier_names

__all__ = ["load_npz"]

PREFIXES = ("opt/target/", "params/img/", "params/")
"""What may stand before all names of the image tower."""

LEFT_OUT = re.compile(r"(resnet/)?(head|pre_logits|MAPHead_\d+)/.*|opt/state/.*|(txt/.*|t|b)")
"""Arrays that a backbone needs not: classifiers and what stands before them, text towers."""

POSITIONS = re.compile(r"(.*[./])?(pos_embed|pos_embedding)")
"""Arrays that are resampled to the model's image size."""


def load_npz(model: nn.Module, path: Path) -> None:
    """Load a file in the JAX layout in place with timm's reader.

    The reader takes what it knows and leaves the rest of the file and of the model alone. So the
    numbers are counted: as many must be in the file as in the model, but for positions, which are
    resampled.

    Raises:
        BackboneError: The model has no such layout, the file has more or fewer weights than the
            model, or a value is not finite.
    """
    reader: Any = getattr(model, "load_pretrained", None)
    if reader is None:
        raise BackboneError(f"{type(model).__name__} cannot be loaded from an .npz file.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            shapes = _own({name: archive[name].shape for name in archive.files})
    except Exception as error:  # damaged archives make their reader raise anything
        raise _unreadable(path, error) from error
    found, depth = _depth(shapes), len(getattr(model, "blocks", ()))
    if found != depth:
        raise BackboneError(f"{path} holds {found} encoder blocks, but the model has {depth}.")
    try:
        reader(str(path))
    except Exception as error:  # missing arrays, and shapes that timm's reader does not expect
        raise _unreadable(path, error) from error
    classifier = set(classifier_names(model))
    needed = {
        name: tensor.shape
        for name, tensor in model.state_dict().items()
        if name not in classifier and not name.endswith("num_batches_tracked")
    }
    given, wanted = _count(shapes), _count(needed)
    if given != wanted:
        raise BackboneError(
            f"{path} holds {given} numbers of a backbone, but {type(model).__name__} has {wanted}: "
            "it holds weights of another model."
        )
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise BackboneError(f"{path} holds values that are not finite.")


def _unreadable(path: Path, error: Exception) -> BackboneError:
    reason = " ".join(str(error).split())[:200]
    if "allow_pickle" in reason:
        reason = "it holds Python objects, which could run code"
    return BackboneError(f"{path} cannot be read as weights: {reason}.")


def _own(shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes of the image tower's arrays by their names without a prefix."""
    prefix = next((p for p in PREFIXES if any(name.startswith(p) for name in shapes)), "")
    names = {name: name.removeprefix(prefix) for name in shapes if name.startswith(prefix)}
    return {own: shapes[name] for name, own in names.items() if not LEFT_OUT.fullmatch(own)}


def _depth(shapes: Mapping[str, Any]) -> int:
    """Number of encoder blocks, one by one or stacked in one array (big_vision)."""
    stacked = [s[0] for name, s in shapes.items() if "encoderblock/" in name]
    single = set(re.findall(r"encoderblock_(\d+)/", "\n".join(shapes)))
    return stacked[0] if stacked else len(single)


def _count(shapes: Mapping[str, Any]) -> int:
    return sum(math.prod(shape) for name, shape in shapes.items() if not POSITIONS.fullmatch(name))
