"""``model.ckpt``: write a tuned task, and read it without its backbone.

The file is safetensors. Its tensors are ``update.SITE.PARAMETER`` and ``head.NAME``. Its metadata
has one entry, ``aoft``: JSON with the format version, the method and its settings, the identity of
the backbone, the classes, the activation and the preprocessing. Reading never executes anything
from the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from aoft_deploy.checkpoints.file_format import (
    FORMAT,
    checkpoint_file,
    parse_description,
    read_described,
    read_tensors,
)
from aoft_deploy.classes import Classes, check_classes
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import BackboneError, CheckpointError, OutputError
from aoft_deploy.files import replacing
from aoft_deploy.tuning.backbones.architecture import CHANGED
from aoft_deploy.tuning.backbones.identity import Backbone, difference_from_timm
from aoft_deploy.tuning.tuned_model import TunedModel

__all__ = ["Checkpoint", "description", "parse_checkpoint", "read_checkpoint", "save"]


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Allowed dtypes of a checkpoint's tensors."""


@dataclass(frozen=True)
class Checkpoint:
    """A tuned task.

    Attributes:
        method: Name of the fine-tuning method.
        settings: Settings of the method.
        backbone: Identity of the backbone that the task was trained on.
        classes: Class names, in the order of the logits, with their ``activation``.
        preprocessing: How an image becomes the model's input.
        tensors: The trained parameters by name.
        training: Figures of the training run, for information only.
    """

    method: str
    settings: Mapping[str, Any]
    backbone: Backbone
    classes: Classes
    preprocessing: Preprocessing
    tensors: Mapping[str, Tensor]
    training: Mapping[str, Any] = field(default_factory=dict)


def save(
    tuned: TunedModel,
    path: Path | str,
    *,
    classes: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    activation: str | None = None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write the trained parameters of a model as a checkpoint, completely or not at all.

    Args:
        tuned: The model. It gets the values below as its own, and keeps its own for None.
        path: File to write.
        classes: One name for each logit.
        preprocessing: How images were prepared in training.
        activation: What the outputs mean: ``softmax`` for one class of several, ``sigmoid`` for
            independent labels, ``none`` for plain values.
        training: Figures of the training run, as JSON values.

    Raises:
        CheckpointError: A trained parameter is not finite, or the model is a softmax of one class.
        SettingError: The number of classes differs from the number of logits.
        UnknownNameError: The activation is unknown.
        OutputError: The file cannot be written.
    """
    if classes is not None:
        tuned.classes = classes
    if activation is not None:
        tuned.activation = activation
    if preprocessing is not None:
        tuned.preprocessing = preprocessing
    check_classes(tuned.classes, "The model")
    tensors = {n: p.detach().cpu().contiguous() for n, p in tuned.trained().items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{name} holds values that are not finite: training diverged.")
    text = description(tuned, tuned.classes, tuned.preprocessing, training)
    with replacing(Path(path)) as temporary:
        try:
            save_file(tensors, temporary, metadata={"aoft": text})
        except SafetensorError as error:
            raise OutputError(f"Cannot write {path}: {error}.") from error


def description(
    tuned: TunedModel,
    classes: Classes,
    preprocessing: Preprocessing,
    training: Mapping[str, Any] | None = None,
) -> str:
    """A checkpoint's metadata as JSON; arguments as for ``save``.

    A backbone that timm does not create from its name and arguments is marked. Such a checkpoint
    can only be attached to a model object in Python.
    """
    backbone = tuned.identity.to_dict()
    if reason := difference_from_timm(tuned.identity):
        backbone["origin"] = CHANGED + reason
    metadata = {
        "format": FORMAT,
        "method": tuned.method,
        "settings": tuned.settings,
        "backbone": backbone,
        "classes": list(classes),
        "activation": classes.activation,
        "preprocessing": preprocessing.to_dict(),
        "training": dict(training or {}),
    }
    return json.dumps(metadata)


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Read a checkpoint without its backbone.

    Args:
        path: The checkpoint, or the folder of a training run.

    Raises:
        CheckpointError: The file is missing, damaged, not a checkpoint, or of a newer format.
    """
    path = checkpoint_file(path)
    tensors, text = read_described(path, partial(read_tensors, framework="pt"))
    return parse_checkpoint(path, text, tensors)


def parse_checkpoint(path: Path, text: str, tensors: Mapping[str, Tensor]) -> Checkpoint:
    """A checkpoint from a file's metadata text and tensors; the path is for messages."""
    metadata = parse_description(path, text)
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise CheckpointError(f"{name} in {path} is {tensor.dtype}, but must be a float type.")
    try:
        backbone = Backbone.from_dict(metadata["backbone"])
    except BackboneError as error:
        raise CheckpointError(f"The metadata of {path} names no backbone: {error}") from error
    preprocessing = Preprocessing.from_dict(metadata["preprocessing"])
    plain = {k: metadata[k] for k in ("method", "settings", "classes", "training")}
    return Checkpoint(backbone=backbone, preprocessing=preprocessing, tensors=tensors, **plain)
