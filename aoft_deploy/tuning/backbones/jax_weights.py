"""Load weights in the JAX layout (.npz), which Google's and the papers' codes publish."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from aoft_deploy.errors import BackboneError
from aoft_deploy.texts import one_line
from aoft_deploy.tuning.sites.classifier import classifier_names

__all__ = ["load_npz"]

PREFIXES = ("opt/target/", "params/img/", "params/")
"""Possible prefixes of all names of the image tower."""

LEFT_OUT = re.compile(r"(resnet/)?(head|pre_logits|MAPHead_\d+)/.*|opt/state/.*|(txt/.*|t|b)")
"""Arrays that a backbone does not need: classifiers, layers before them, text towers."""

POSITIONS = re.compile(r"(.*[./])?(pos_embed|pos_embedding)")
"""Arrays that are resampled to the model's image size."""


def load_npz(model: nn.Module, path: Path) -> None:
    """Load a file in the JAX layout into a model, with timm's reader.

    The reader ignores arrays and parameters that it does not know. So the file and the model must
    hold the same number of weights, except for position embeddings, which are resampled.

    Raises:
        BackboneError: timm has no .npz reader for the model, the file has more or fewer weights
            than the model, or a value is not finite.
    """
    reader: Any = getattr(model, "load_pretrained", None)
    if reader is None:
        raise BackboneError(f"{type(model).__name__} cannot be loaded from an .npz file.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            shapes = _own({name: archive[name].shape for name in archive.files})
    except Exception as error:  # damaged archives make NumPy raise many types
        raise _unreadable(path, error) from error
    found, depth = _depth(shapes), len(getattr(model, "blocks", ()))
    if found != depth:
        raise BackboneError(f"{path} holds {found} encoder blocks, but the model has {depth}.")
    try:
        reader(str(path))
    except Exception as error:  # missing arrays and unexpected shapes
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
            f"{path} holds {given} weights of a backbone, but {type(model).__name__} has {wanted}: "
            "it is a file of another model."
        )
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise BackboneError(f"{path} holds values that are not finite.")


def _unreadable(path: Path, error: Exception) -> BackboneError:
    reason = one_line(error)
    if "allow_pickle" in reason:
        reason = "it holds Python objects, which could run code"
    return BackboneError(f"{path} cannot be read as weights: {reason}.")


def _own(shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes of the image tower's arrays, by their names without the prefix."""
    prefix = next((p for p in PREFIXES if any(name.startswith(p) for name in shapes)), "")
    names = {name: name.removeprefix(prefix) for name in shapes if name.startswith(prefix)}
    return {own: shapes[name] for name, own in names.items() if not LEFT_OUT.fullmatch(own)}


def _depth(shapes: Mapping[str, Any]) -> int:
    """Number of encoder blocks, in separate arrays or stacked in one (big_vision)."""
    stacked = [s[0] for name, s in shapes.items() if "encoderblock/" in name]
    single = set(re.findall(r"encoderblock_(\d+)/", "\n".join(shapes)))
    return stacked[0] if stacked else len(single)


def _count(shapes: Mapping[str, Any]) -> int:
    return sum(math.prod(shape) for name, shape in shapes.items() if not POSITIONS.fullmatch(name))
