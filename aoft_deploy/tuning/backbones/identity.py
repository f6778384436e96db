"""The identity of a backbone: its timm name, its arguments and the hash of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Self

import timm
import torch
from torch import Tensor, nn

import aoft_deploy.tuning.backbones.bundled  # noqa: F401  (registers aoft_vit_nano with timm)
from aoft_deploy.errors import BackboneError
from aoft_deploy.processors import processors
from aoft_deploy.texts import one_line
from aoft_deploy.tuning.backbones.architecture import (
    CHANGED,
    architecture_label,
    evaluation_args,
    first_difference,
    same_architecture,
    structure,
)
from aoft_deploy.tuning.backbones.timm_loading import skeleton
from aoft_deploy.tuning.sites.classifier import classifier_names

__all__ = [
    "Backbone",
    "difference",
    "difference_from_timm",
    "identify",
    "image_size",
    "weights_digest",
]

RESAMPLED = ("pos_embed", "relative_position_bias_table")
"""Tensors that timm resamples when a model is created for another image size. The result may be
rounded differently on another machine, so the hash of such a model leaves them out."""

KEYS = ("name", "digest", "origin", "args")
"""Fields of a ``Backbone`` that are written to files."""

RESERVED = {
    *("name", "num_classes", "weights", "classifier_follows", "args"),
    *signature(timm.create_model).parameters,
}
"""Parameters of ``create_backbone`` and ``timm.create_model`` that do not shape a model."""


@dataclass(frozen=True)
class Backbone:
    """Identity of a backbone.

    Attributes:
        name: timm name, with its pre-training tag if it has one.
        digest: Hash of the weights, see ``weights_digest``.
        origin: ``"timm"`` for weights that timm loads by that name, ``"file:NAME"`` for weights
            from a file, ``"unknown"`` for a model object that the caller passed in, and
            ``"changed: REASON"`` for a model that timm does not create from name and args.
        args: Further arguments of ``timm.create_model``, such as ``img_size``.
        structure: Classes and settings of the modules of a model object that the caller passed in,
            which name and args may not describe. It is not written to files.
    """

    name: str
    digest: str
    origin: str = "unknown"
    args: Mapping[str, Any] = field(default_factory=dict)
    structure: tuple[str, ...] = field(default=(), repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {key: getattr(self, key) for key in KEYS} | {"args": dict(self.args)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Parse the JSON form from an untrusted file.

        Raises:
            BackboneError: A key or value that ``to_dict`` does not write, or an argument that does
                not shape the model. Some of those make timm read or download other files.
        """
        unknown = sorted(map(str, data.keys() - set(KEYS)))
        if unknown or not {"name", "digest"} <= data.keys():
            raise BackboneError(f"It has the keys {', '.join(map(str, data)) or 'none'}.")
        backbone = cls(**data)
        texts = backbone.name, backbone.digest, backbone.origin
        if not all(isinstance(text, str) for text in texts) or not isinstance(backbone.args, dict):
            raise BackboneError(
                f"Its name, digest and origin must be texts, its args a dict: {data}."
            )
        for key, value in backbone.args.items():
            if key not in _shaping_args(backbone.args):
                raise BackboneError(f"It must not be made with {key}={value!r}.")
        return backbone

    @property
    def skeleton(self) -> nn.Module:
        """The architecture as timm creates it, with one class and no weights."""
        return skeleton(self.name, num_classes=1, **self.args)


def identify(
    model: nn.Module,
    *,
    name: str | None = None,
    origin: str = "unknown",
    args: Mapping[str, Any] | None = None,
) -> Backbone:
    """The identity of a plain timm model.

    Args:
        model: The model, before any update is attached.
        name: Its timm name; None reads it from the model.
        origin: Where its weights come from.
        args: Arguments it was created with; None reads them from the model.

    Raises:
        BackboneError: ``name`` is None and the model does not record its name.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    if name is None:
        parts = config.get("architecture"), config.get("tag")
        name = ".".join(part for part in parts if part)
        if not name:
            raise BackboneError(
                f"{type(model).__name__} does not record its timm name: pass `backbone`."
            )
    _, height, width = config.get("input_size") or (3, 0, 0)
    size = image_size(model)
    resized = size is not None and size != (height if height == width else (height, width))
    digest = weights_digest(model, RESAMPLED if resized else ())
    if args is not None:
        stored = {k: list(v) if isinstance(v, tuple) else v for k, v in args.items()}
        return Backbone(name, digest, origin, stored)
    args = _shaping_args(evaluation_args(getattr(model, "_model_args", {})))
    if size is not None:
        args.pop("img_size", None)
    if resized:
        args["img_size"] = list(size) if isinstance(size, tuple) else size
    return Backbone(name, digest, origin, args, _structure(model))


def weights_digest(model: nn.Module, excluded: tuple[str, ...] = ()) -> str:
    """SHA-256 over names, types, shapes and bytes of all weights except the classifier's.

    Args:
        model: A plain timm model.
        excluded: Last name components of tensors to leave out.
    """
    skip = set(classifier_names(model))
    tensors = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in skip and name.rpartition(".")[2] not in excluded
    }
    with ThreadPoolExecutor(processors()) as pool:
        parts = list(pool.map(_tensor_digest, tensors.values()))
    total = hashlib.sha256()
    for name, part in sorted(zip(tensors, parts, strict=True)):
        total.update(name.encode() + b"\0" + part)
    return total.hexdigest()


def image_size(model: nn.Module) -> int | tuple[int, int] | None:
    """Side of a model's square input in pixels, or height and width; None if it takes any size."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if not isinstance(size, tuple):
        return None
    height, width = size
    return height if height == width else (height, width)


def difference(found: Backbone, wanted: Backbone) -> str:
    """How ``found`` differs from ``wanted``, in words; empty if both compute the same.

    Two names are the same architecture if timm creates the same modules with the same settings.
    """
    if found.digest != wanted.digest:
        return f"weights {found.digest[:12]} instead of {wanted.digest[:12]}"
    if wanted.origin.startswith(CHANGED) and found.origin != wanted.origin:
        return wanted.origin.removeprefix(CHANGED)
    if same_architecture(found.name, found.args, wanted.name, wanted.args):
        return ""
    try:
        return first_difference(_structure(found.skeleton), _structure(wanted.skeleton))
    except Exception:  # timm raises many types for unknown names and arguments
        names = (
            architecture_label(found.name, found.args),
            architecture_label(wanted.name, wanted.args),
        )
        return "{} is another architecture than {}".format(*names)


def difference_from_timm(backbone: Backbone) -> str:
    """How a model object differs from what timm creates from its name and args; empty if equal."""
    if not backbone.structure:
        return ""
    try:
        return first_difference(backbone.structure, _structure(backbone.skeleton))
    except Exception as error:  # timm raises many types for unknown names and arguments
        return one_line(error, 100)


def _structure(model: nn.Module) -> tuple[str, ...]:
    heads = {name.rpartition(".")[0] for name in classifier_names(model)}
    return structure(model, tuple(heads))


def _shaping_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that only shape a model and have values that a file can store."""
    return {
        key: value
        for key, value in args.items()
        if key not in RESERVED
        and (isinstance(value, (bool, int, float, str)) or (key == "img_size" and _is_pair(value)))
    }


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(n) is int for n in value)


def _tensor_digest(tensor: Tensor) -> bytes:
    data = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{data.dtype} {tuple(data.shape)}\n".encode())
    data_bytes: Any = data.reshape(-1).view(torch.uint8).numpy()
    digest.update(data_bytes)
    return digest.digest()
