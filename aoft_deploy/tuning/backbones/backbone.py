"""The frozen model that tasks share: made by timm, known by the hash of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any, Self

import timm
import torch
from timm.models import get_deprecated_models
from torch import Tensor, nn

import aoft_deploy.tuning.backbones.bundled  # noqa: F401  (registers aoft_vit_nano with timm)
from aoft_deploy.errors import BackboneError, UnknownNameError
from aoft_deploy.file_signatures import file_kind
from aoft_deploy.processors import processors
from aoft_deploy.tuning.backbones.architecture import (
    CHANGED,
    called,
    first_difference,
    same_architecture,
    shaping,
    structure,
)
from aoft_deploy.tuning.backbones.jax_weights import load_npz
from aoft_deploy.tuning.backbones.timm_loading import Load, Usual, made, skeleton
from aoft_deploy.tuning.backbones.weights_file import check_fit, file_weights
from aoft_deploy.tuning.sites.classifier import classifier_names

__all__ = [
    "Backbone",
    "create_backbone",
    "difference",
    "file_classifier",
    "identify",
    "image_size",
    "unnamed",
    "weights_digest",
]

RESAMPLED = ("pos_embed", "relative_position_bias_table")
"""Tensors that timm resamples when a model is made for another image size. Resampling may round
differently elsewhere, so they are then left out of the hash."""

KEPT = ("name", "digest", "origin", "args")
"""What a file keeps of a backbone."""


@dataclass(frozen=True)
class Backbone:
    """Identity of a backbone.

    Attributes:
        name: timm name, with its pre-training tag where there is one.
        digest: Hash of its weights, see ``weights_digest``.
        origin: ``"timm"`` for weights that timm loads by that name, ``"file:NAME"`` for weights
            from a file, ``"unknown"`` for a model that was handed over in memory, and after
            ``"changed: "`` how that differs from what timm makes by its name.
        args: Further arguments of ``timm.create_model``, such as ``img_size``.
        structure: Classes and settings of a model that was handed over in memory, which its name
            and args may not tell; a file does not keep them.
    """

    name: str
    digest: str
    origin: str = "unknown"
    args: Mapping[str, Any] = field(default_factory=dict)
    structure: tuple[str, ...] = field(default=(), repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {key: getattr(self, key) for key in KEPT} | {"args": dict(self.args)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of ``to_dict`` for data from a stranger's file.

        Raises:
            BackboneError: A key or value that ``to_dict`` does not write, or an argument that does
                more than shape the model: with some, timm would read or download other files.
        """
        unknown = sorted(map(str, data.keys() - set(KEPT)))
        if unknown or not {"name", "digest"} <= data.keys():
            raise BackboneError(f"It has the keys {', '.join(map(str, data)) or 'none'}.")
        backbone = cls(**data)
        texts = backbone.name, backbone.digest, backbone.origin
        if not all(isinstance(text, str) for text in texts) or not isinstance(backbone.args, dict):
            raise BackboneError(
                f"Its name, digest and origin must be texts, its args a dict: {data}."
            )
        for key, value in backbone.args.items():
            if key not in _plain(backbone.args):
                raise BackboneError(f"It must not be made with {key}={value!r}.")
        return backbone

    @property
    def skeleton(self) -> nn.Module:
        """The architecture as timm makes it, with one class and no weights."""
        return skeleton(self.name, num_classes=1, **self.args)


def create_backbone(
    name: str, *, num_classes: int, weights: Path | None = None, **args: Any
) -> tuple[nn.Module, Backbone]:
    """A pre-trained timm model and its identity.

    Args:
        name: timm name, such as ``vit_base_patch16_224.augreg_in21k``.
        num_classes: Width of the new classifier.
        weights: File with the weights (.safetensors, .pth, .bin, or .npz in the JAX layout). None
            takes timm's own: from the hub, or bundled.
        args: Further arguments of ``timm.create_model``, such as ``img_size``.

    Raises:
        UnknownNameError: timm knows no such model.
        BackboneError: The weights are missing, do not fit, or cannot be downloaded.
    """
    name = get_deprecated_models().get(name) or name
    load = _loader(name, weights, args)
    model = _made(name, weights, load, num_classes=num_classes, **args)
    origin = "timm" if weights is None else f"file:{Path(weights).name}"
    return model.eval(), identify(model, name=name, origin=origin, args=args)


def file_classifier(name: str, weights: Path) -> dict[str, Tensor]:
    """The classifier in a file of backbone weights; empty where it has none under timm's names.

    Raises:
        UnknownNameError: timm knows no such model.
        BackboneError: The file cannot be read or does not fit the model.
    """
    found: dict[str, Tensor] = {}

    def load(model: nn.Module, usual: Usual) -> None:
        if _kind(weights) != "npz":
            state = file_weights(model, usual, weights, _resizes(name, {}))
            found.update({n: state[n] for n in classifier_names(model) if n in state})

    _made(name, weights, load, num_classes=1)
    return found


def difference(found: Backbone, wanted: Backbone) -> str:
    """How a backbone differs from the one that is wanted, in words; empty where it is the same.

    Other names are the same architecture where timm makes the same modules with the same settings.
    """
    if found.digest != wanted.digest:
        return f"weights {found.digest[:12]} instead of {wanted.digest[:12]}"
    if wanted.origin.startswith(CHANGED) and found.origin != wanted.origin:
        return wanted.origin.removeprefix(CHANGED)
    if same_architecture(found.name, found.args, wanted.name, wanted.args):
        return ""
    try:
        return first_difference(_structure(found.skeleton), _structure(wanted.skeleton))
    except Exception:  # timm raises anything for names and arguments that it does not know
        names = called(found.name, found.args), called(wanted.name, wanted.args)
        return "{} is another architecture than {}".format(*names)


def unnamed(backbone: Backbone) -> str:
    """How a model that was handed over differs from what timm makes by its name; empty if not."""
    if not backbone.structure:
        return ""
    try:
        return first_difference(backbone.structure, _structure(backbone.skeleton))
    except Exception as error:  # timm raises anything for names and arguments it does not know
        return " ".join(str(error).split())[:100] or type(error).__name__


def _structure(model: nn.Module) -> tuple[str, ...]:
    heads = {name.rpartition(".")[0] for name in classifier_names(model)}
    return structure(model, tuple(heads))


def _plain(args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that shape a model and no more, with values that a file can keep."""
    reserved = {*signature(create_backbone).parameters, *signature(timm.create_model).parameters}
    return {
        key: value
        for key, value in args.items()
        if key not in reserved and isinstance(value, (bool, int, float, str))
    }


def _made(name: str, weights: Path | None, load: Load, **args: Any) -> nn.Module:
    if not timm.is_model(name.partition(".")[0]):
        raise UnknownNameError("backbone", name, timm.list_models())
    try:
        return made(name, load, **args)
    except BackboneError:
        raise
    except Exception as error:  # timm, the hub and the network raise anything here
        raise BackboneError(_creation_failure(name, weights, error)) from error


def _loader(name: str, weights: Path | None, args: Mapping[str, Any]) -> Load:
    """What fills the model: a file, or timm's own weights, which must fill it just as well."""

    def from_file(model: nn.Module, usual: Usual) -> None:
        assert weights is not None
        if _kind(weights) == "npz":
            load_npz(model, weights)
            return
        state = file_weights(model, usual, weights, _resizes(name, args))
        classifier = set(classifier_names(model))
        rest = {name: tensor for name, tensor in state.items() if name not in classifier}
        model.load_state_dict(rest, strict=False)

    def from_timm(model: nn.Module, usual: Usual) -> None:
        put = model.load_state_dict

        def fitting(state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
            check_fit(model, state, f"timm's file for {name}", usual.strict)
            return put(state, strict=False, assign=assign)

        vars(model)["load_state_dict"] = fitting
        try:
            usual.load()
        finally:
            del vars(model)["load_state_dict"]

    return from_timm if weights is None else from_file


def _kind(weights: Path) -> str:
    if not weights.is_file():
        raise BackboneError(f"There is no weights file {weights}.")
    return file_kind(weights)


def _resizes(name: str, args: Mapping[str, Any]) -> bool:
    """Whether patches may be resampled: the model was trained so, or another size was asked for."""
    return name.startswith("flexivit") or "patch_size" in args


def identify(
    model: nn.Module,
    *,
    name: str | None = None,
    origin: str = "unknown",
    args: Mapping[str, Any] | None = None,
) -> Backbone:
    """Identity of a plain timm model.

    Args:
        model: The model, before any update is attached.
        name: Its timm name; None reads it from the model.
        origin: Where its weights come from.
        args: Arguments it was made with; None reads the image size from the model.

    Raises:
        BackboneError: The name is not given and the model does not know it.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    if name is None:
        parts = config.get("architecture"), config.get("tag")
        name = ".".join(part for part in parts if part)
        if not name:
            raise BackboneError(
                f"{type(model).__name__} does not know its timm name: give it with backbone=."
            )
    native = (config.get("input_size") or (3, 0, 0))[1]
    size = image_size(model)
    resized = size is not None and size != native
    digest = weights_digest(model, RESAMPLED if resized else ())
    if args is not None:
        return Backbone(name, digest, origin, dict(args))
    args = _plain(shaping(getattr(model, "_model_args", {})))
    if size is not None:
        args.pop("img_size", None)
    if resized:
        args["img_size"] = size
    return Backbone(name, digest, origin, args, _structure(model))


def weights_digest(model: nn.Module, excluded: tuple[str, ...] = ()) -> str:
    """SHA-256 over names, types, shapes and bytes of all weights but the classifier's.

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
    whole = hashlib.sha256()
    for name, part in sorted(zip(tensors, parts, strict=True)):
        whole.update(name.encode() + b"\0" + part)
    return whole.hexdigest()


def _tensor_digest(tensor: Tensor) -> bytes:
    data = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{data.dtype} {tuple(data.shape)}\n".encode())
    data_bytes: Any = data.reshape(-1).view(torch.uint8).numpy()
    digest.update(data_bytes)
    return digest.digest()


def image_size(model: nn.Module) -> int | None:
    """Side of a model's square input in pixels, or None where it takes any size."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return size[0] if isinstance(size, tuple) else None


def _creation_failure(name: str, weights: Path | None, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if weights is not None or isinstance(error, TypeError):
        return f"timm cannot make {name}: {reason}."
    return (
        f"The weights of {name} could not be had from timm ({reason}): "
        "check the name and the network, or give a file with --backbone-weights."
    )
