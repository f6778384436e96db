"""A task as a fleet holds it: a row of numbers, its classifier's rows and its classes.

Read from a checkpoint with neither torch nor timm, and checked against what all tasks of a fleet
share.
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

from aoft_deploy.artefacts.prediction import check_classes
from aoft_deploy.checkpoints.file_format import parse_description, read_tensors
from aoft_deploy.errors import CheckpointError
from aoft_deploy.file_signatures import foreign
from aoft_deploy.tuning.backbones.architecture import (
    CHANGED,
    architecture_label,
    same_architecture,
)

__all__ = ["TaskKind", "TaskParameters", "read_task"]


class TaskParameters(NamedTuple):
    """A task's own numbers.

    Attributes:
        row: Its updates' parameters in the fleet's order, float32 (numbers,).
        head: Its classifier, weight and bias of each class, float32 (classes, width + 1).
        classes: Names of its classes.
    """

    row: NDArray[np.float32]
    head: NDArray[np.float32]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class TaskKind:
    """What all tasks of a fleet share.

    Attributes:
        digest: Hash of the backbone's weights.
        method: Name of the fine-tuning method.
        settings: Its settings.
        preprocessing: How an image becomes the model's input, as ``Preprocessing.to_dict`` has it.
        order: Names and shapes of the tensors that make a row, in order.
        width: Features that a classifier takes.
        defaults: The method's default settings, for checkpoints from before a setting existed.
        backbone: timm name of the backbone; empty in stores that were packed without it.
        args: Arguments that the backbone was made with.
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
        """Take over the metadata of a fleet's file.

        Raises:
            KeyError, TypeError, ValueError: They are no fleet's.
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
            TypeError, ValueError: The data are no task kind.
        """
        order = tuple((str(name), tuple(shape)) for name, shape in data["order"])
        return cls(**{**data, "order": order, "args": dict(data.get("args", {}))})

    def to_dict(self) -> dict[str, Any]:
        """Values that JSON keeps exactly."""
        return asdict(self)

    @property
    def row_length(self) -> int:
        """Length of a row."""
        return sum(math.prod(shape) for _, shape in self.order)

    def check(self, path: object, found: Mapping[str, Any]) -> None:
        """Refuse what belongs to another kind.

        Args:
            path: Where it stands, for the message.
            found: Its digest, method, settings and preprocessing; its backbone and args, where
                it names them.

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
        """Refuse a store of another kind.

        Raises:
            CheckpointError: It is.
        """
        self.check(path, vars(other))
        if other != self:
            raise CheckpointError(
                f"{path} holds the numbers of a task in another order than the fleet: pack anew "
                "with this fleet's kind."
            )

    def check_parameters(self, name: str, task: TaskParameters) -> None:
        """Refuse numbers of other shapes, or not finite, and tasks of one class.

        Raises:
            CheckpointError: They are.
        """
        check_classes(task.classes, f"Task {name!r}")
        row, head = (self.row_length,), (len(task.classes), self.width + 1)
        if task.row.shape != row or task.head.shape != head:
            raise CheckpointError(
                f"Task {name!r} has numbers of shape {task.row.shape} and a classifier of "
                f"{task.head.shape} for {len(task.classes)} classes, but needs {row} and {head}."
            )
        if not (np.isfinite(task.row).all() and np.isfinite(task.head).all()):
            raise CheckpointError(f"Task {name!r} holds numbers that are not finite.")


def read_task(path: Path, kind: TaskKind) -> TaskParameters:
    """A task from its ``model.ckpt``.

    Args:
        path: The checkpoint.
        kind: What it must be.

    Raises:
        CheckpointError: The file is damaged, is of another kind, or holds numbers that are not
            finite.
    """
    try:
        tensors, metadata = read_tensors(path, "np")
    except CheckpointError:
        raise
    except Exception as error:
        told = foreign(path, "safetensors")
        why = f": it {told}" if told else f" ({error})"
        raise CheckpointError(f"{path} is no checkpoint of aoft-train{why}.") from error
    if "aoft" not in metadata:
        raise CheckpointError(f"{path} is a safetensors file, but no checkpoint of aoft-train.")
    described = parse_description(path, metadata["aoft"])
    backbone = described["backbone"]
    args = backbone.get("args", {})
    if not (isinstance(backbone.get("name"), str) and isinstance(args, dict)):
        raise CheckpointError(f"The metadata of {path} names no backbone.")
    origin = str(backbone.get("origin", ""))
    if origin.startswith(CHANGED):
        raise CheckpointError(
            f"{path} was trained on a model that timm does not make as {backbone['name']} "
            f"({origin.removeprefix(CHANGED)}): a fleet has no such backbone."
        )
    named = {"digest": backbone.get("digest"), "backbone": backbone["name"], "args": args}
    kind.check(path, {**described, **named})
    classes = tuple(str(name) for name in described["classes"])
    check_classes(classes, str(path))
    rest = dict(tensors)
    parts = [_checked(path, name, shape, rest.pop(name, None)) for name, shape in kind.order]
    row = np.concatenate([part.ravel() for part in parts] or [np.empty(0, np.float32)])
    head = _checked(path, "classifier", (len(classes), kind.width + 1), _head(rest))
    return TaskParameters(row, head, classes)


def _head(tensors: Mapping[str, NDArray[Any]]) -> NDArray[Any] | None:
    """Rows of weight and bias from all that is not in the row; None where that is not them."""
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
    if tensor is not None and tensor.shape == tuple(shape) and tensor.dtype.kind == "f":
        with np.errstate(over="ignore"):
            numbers = tensor.astype(np.float32, copy=False)
        if np.isfinite(numbers).all():
            return numbers
    raise CheckpointError(f"{name} in {path} must be finite numbers of shape {tuple(shape)}.")
