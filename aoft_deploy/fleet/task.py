"""One task of a fleet: its parameters, its classifier and its classes.

Tasks are read from checkpoints with neither torch nor timm, and checked against the properties that
all tasks of a fleet share.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.checkpoints.file_format import (
    checkpoint_file,
    parse_description,
    read_tensors,
)
from aoft_deploy.classes import Classes, check_classes
from aoft_deploy.errors import CheckpointError
from aoft_deploy.tuning.backbones.architecture import (
    CHANGED,
    architecture_label,
    same_architecture,
)

__all__ = ["TaskKind", "TaskParameters", "read_task"]


class TaskParameters(NamedTuple):
    """The parameters of one task.

    Attributes:
        row: Parameters of its updates in the fleet's order, float32 (row_length,).
        head: Its classifier, weights and bias of each class, float32 (classes, width + 1).
        classes: Names of its classes; plain names mean a softmax.
    """

    row: NDArray[np.float32]
    head: NDArray[np.float32]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class TaskKind:
    """The properties that all tasks of a fleet share.

    Attributes:
        digest: Hash of the backbone's weights.
        method: Name of the fine-tuning method.
        settings: The method's settings.
        preprocessing: How an image becomes the model's input, from ``Preprocessing.to_dict``.
        order: Names and shapes of the tensors that make up a row, in order.
        width: Features that a classifier takes.
        defaults: The method's default settings, for checkpoints older than a setting.
        backbone: timm name of the backbone; empty in stores that were packed without it.
        args: Arguments that the backbone was created with.
    """

    digest: str
    method: str
    settings: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    order: tuple[tuple[str, tuple[int, ...]], ...]
    width: int
    defaults: Mapping[str, Any] = field(default_factory=dict, compare=False)
    backbone: str = field(default="", compare=False)
    args: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def of_fleet(cls, info: Mapping[str, str], width: int) -> Self:
        """Read the kind from the metadata of a fleet's artefact.

        Raises:
            KeyError, TypeError, ValueError: The metadata are not those of a fleet.
        """
        backbone = json.loads(info["backbone"])
        return cls.from_dict(
            {
                "digest": str(backbone["digest"]),
                "backbone": str(backbone["name"]),
                "args": dict(backbone.get("args", {})),
                "method": info["method"],
                "settings": json.loads(info["settings"]),
                "preprocessing": json.loads(info["preprocessing"]),
                "order": json.loads(info["row"]),
                "width": width,
                "defaults": json.loads(info.get("defaults", "{}")),
            }
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of ``to_dict``.

        Raises:
            TypeError, ValueError: The data do not describe a task kind.
        """
        order = tuple((str(name), tuple(shape)) for name, shape in data["order"])
        return cls(**{**data, "order": order, "args": dict(data.get("args", {}))})

    def to_dict(self) -> dict[str, Any]:
        """The fields as values that JSON represents exactly."""
        return asdict(self)

    @property
    def row_length(self) -> int:
        """Number of parameters in a row."""
        return sum(math.prod(shape) for _, shape in self.order)

    def check(self, path: object, found: Mapping[str, Any]) -> None:
        """Raise if a checkpoint or a store is of another kind.

        Args:
            path: Name of the file, for the message.
            found: Its digest, method, settings and preprocessing; also its backbone and args if
                the file names them.

        Raises:
            CheckpointError: One of them differs.
        """
        if found["digest"] != self.digest:
            raise CheckpointError(
                f"{path} was trained on backbone weights {str(found['digest'])[:12]}, but the "
                f"fleet's are {self.digest[:12]}."
            )
        name, args = str(found.get("backbone", "")), found.get("args", {})
        if name and self.backbone and not same_architecture(name, args, self.backbone, self.args):
            trained_on = architecture_label(name, args)
            backbone = architecture_label(self.backbone, self.args)
            raise CheckpointError(
                f"{path} was trained on {trained_on}, but the fleet's backbone is {backbone}, "
                "which may compute something else with the same weights: train the task on the "
                "fleet's backbone."
            )
        full = {**found, "settings": {**self.defaults, **found["settings"]}}
        for key in ("method", "settings", "preprocessing"):
            if full[key] != getattr(self, key):
                raise CheckpointError(
                    f"{path} has {key} {found[key]}, but the fleet's is {getattr(self, key)}."
                )

    def check_kind(self, path: object, other: TaskKind) -> None:
        """Raise if a store's kind differs from this one.

        Raises:
            CheckpointError: They differ.
        """
        self.check(path, vars(other))
        if other != self:
            raise CheckpointError(
                f"{path} holds a task's parameters in another order than the fleet: pack it again "
                "with this fleet's kind."
            )

    def check_parameters(self, name: str, task: TaskParameters) -> None:
        """Raise if a task's parameters have the wrong shape or do not describe a classifier.

        Raises:
            CheckpointError: A shape is wrong, a parameter is not finite, or there is no class, or
                one with a softmax.
        """
        check_classes(task.classes, f"Task {name!r}")
        row, head = (self.row_length,), (len(task.classes), self.width + 1)
        if task.row.shape != row or task.head.shape != head:
            raise CheckpointError(
                f"Task {name!r} has parameters of shape {task.row.shape} and a classifier of "
                f"{task.head.shape} for {len(task.classes)} classes, but needs {row} and {head}."
            )
        if not (np.isfinite(task.row).all() and np.isfinite(task.head).all()):
            raise CheckpointError(f"Task {name!r} has parameters that are not finite.")


def read_task(path: Path, kind: TaskKind) -> TaskParameters:
    """Read a task from its ``model.ckpt``.

    Args:
        path: The checkpoint, or the folder of a training run.
        kind: The kind that it must have.

    Raises:
        CheckpointError: The file is damaged, is of another kind, or has parameters that are not
            finite.
    """
    path = checkpoint_file(path)
    try:
        tensors, metadata = read_tensors(path, "np")
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} is no checkpoint of aoft-train ({error}).") from error
    if "aoft" not in metadata:
        raise CheckpointError(f"{path} is a safetensors file, but no checkpoint of aoft-train.")
    description = parse_description(path, metadata["aoft"])
    kind.check(path, {**description, **_backbone(path, description["backbone"])})
    classes: Classes = description["classes"]
    check_classes(classes, str(path))
    remaining = dict(tensors)
    parts = [_checked(path, name, shape, remaining.pop(name, None)) for name, shape in kind.order]
    row = np.concatenate([part.ravel() for part in parts] or [np.empty(0, np.float32)])
    head = _checked(path, "classifier", (len(classes), kind.width + 1), _head(remaining))
    return TaskParameters(row, head, classes)


def _backbone(path: Path, described: Mapping[str, Any]) -> dict[str, Any]:
    """Digest, name and arguments of a checkpoint's backbone.

    Raises:
        CheckpointError: The description is incomplete, or timm does not create such a backbone.
    """
    args = described.get("args", {})
    if not (isinstance(described.get("name"), str) and isinstance(args, dict)):
        raise CheckpointError(f"The metadata of {path} names no backbone.")
    origin = str(described.get("origin", ""))
    if origin.startswith(CHANGED):
        raise CheckpointError(
            f"{path} was trained on a model that timm does not make as {described['name']} "
            f"({origin.removeprefix(CHANGED)}): a fleet has no such backbone."
        )
    return {"digest": described.get("digest"), "backbone": described["name"], "args": args}


def _head(tensors: Mapping[str, NDArray[Any]]) -> NDArray[Any] | None:
    """The classifier's weights and bias side by side.

    Args:
        tensors: Everything that does not belong to the row.

    Returns:
        (classes, width + 1), or None if the tensors are not one weight and at most one bias.
    """
    if not all(name.startswith("head.") for name in tensors):
        return None
    by_axes = {tensor.ndim: tensor for tensor in tensors.values()}
    if len(by_axes) != len(tensors) or 2 not in by_axes or not by_axes.keys() <= {1, 2}:
        return None
    weight = by_axes[2]
    bias = by_axes.get(1, np.zeros(len(weight), weight.dtype))
    return np.column_stack([weight, bias]) if len(weight) == len(bias) else None


def _checked(
    path: Path, name: str, shape: Sequence[int], tensor: NDArray[Any] | None
) -> NDArray[np.float32]:
    """A tensor as float32.

    Raises:
        CheckpointError: It is missing, has another shape, or is not finite in float32.
    """
    if tensor is not None and tensor.shape == tuple(shape) and tensor.dtype.kind == "f":
        with np.errstate(over="ignore"):
            values = tensor.astype(np.float32, copy=False)
        if np.isfinite(values).all():
            return values
    raise CheckpointError(f"{name} in {path} must be finite numbers of shape {tuple(shape)}.")
