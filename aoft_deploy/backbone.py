"""The frozen model that tasks share: made by timm, known by the hash of its weights."""

from __future__ import annotations

import hashlib
import re
import sys
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any, Self

import timm
import torch
from timm.models import load_state_dict
from torch import Tensor, nn

import aoft_deploy.nano  # noqa: F401  (registers aoft_vit_nano with timm)
from aoft_deploy.errors import BackboneError, UnknownNameError
from aoft_deploy.sites import classifier_names

__all__ = ["Backbone", "create_backbone", "identify", "image_size", "weights_digest"]

RESAMPLED = ("pos_embed", "relative_position_bias_table")
"""Tensors that timm resamples when a model is made for another image size. Resampling may round
differently elsewhere, so they are then left out of the hash."""


@dataclass(frozen=True)
class Backbone:
    """Identity of a backbone.

    Attributes:
        name: timm name, with its pre-training tag where there is one.
        digest: Hash of its weights, see ``weights_digest``.
        origin: ``"timm"`` for weights that timm loads by that name, ``"file:NAME"`` for weights
            from a file, ``"unknown"`` for a model that was handed over in memory.
        args: Further arguments of ``timm.create_model``, such as ``img_size``.
    """

    name: str
    digest: str
    origin: str = "unknown"
    args: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of ``to_dict`` for data from a stranger's file.

        Raises:
            BackboneError: A key or value that ``to_dict`` does not write, or an argument that does
                more than shape the model: with some, timm would read or download other files.
        """
        try:
            backbone = cls(**data)
        except TypeError as error:
            raise BackboneError(f"{error}.") from error
        texts = backbone.name, backbone.digest, backbone.origin
        if not all(isinstance(text, str) for text in texts) or not isinstance(backbone.args, dict):
            raise BackboneError(
                f"Its name, digest and origin must be texts, its args a dict: {data}."
            )
        reserved = {
            *signature(create_backbone).parameters,
            *signature(timm.create_model).parameters,
        }
        for key, value in backbone.args.items():
            if key in reserved or not isinstance(value, (bool, int, float, str)):
                raise BackboneError(f"It must not be made with {key}={value!r}.")
        return backbone


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
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise UnknownNameError("backbone", name, timm.list_models())
    try:
        model = timm.create_model(name, pretrained=weights is None, num_classes=num_classes, **args)
    except Exception as error:  # timm, the hub and the network raise anything here
        raise BackboneError(_creation_failure(name, weights, error)) from error
    if weights is not None:
        _load_file(model, Path(weights))
    origin = "timm" if weights is None else f"file:{Path(weights).name}"
    return model.eval(), identify(model, name=name, origin=origin, args=args)


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
    if args is None:
        args = {"img_size": size} if size is not None and size != native else {}
    excluded = RESAMPLED if size is not None and size != native else ()
    return Backbone(name, weights_digest(model, excluded), origin, dict(args))


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
    with ThreadPoolExecutor() as pool:
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


def _load_file(model: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise BackboneError(f"There is no weights file {path}.")
    try:
        if path.suffix == ".npz":
            _load_npz(model, path)
        else:
            _load_state(model, _read_state(model, path), path)
    except BackboneError:
        raise
    except Exception as error:  # damaged files make their readers raise anything
        reason = " ".join(str(error).split())[:200]
        raise BackboneError(f"{path} cannot be read as weights: {reason}.") from error


def _read_state(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """The file's tensors, renamed and resampled by timm's filter for this architecture."""
    state = load_state_dict(str(path), weights_only=True)
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return state if convert is None else dict(convert(state, model))


def _load_npz(model: nn.Module, path: Path) -> None:
    """Load a file in the JAX layout in place with timm's reader."""
    load_pretrained: Any = getattr(model, "load_pretrained", None)
    if load_pretrained is None:
        raise BackboneError(f"{type(model).__name__} cannot be loaded from an .npz file.")
    with zipfile.ZipFile(path) as archive:
        found = set(re.findall(r"encoderblock_(\d+)/", "\n".join(archive.namelist())))
    depth = len(getattr(model, "blocks", ()))
    if len(found) != depth:
        raise BackboneError(f"{path} holds {len(found)} encoder blocks, but the model has {depth}.")
    load_pretrained(str(path))
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise BackboneError(f"{path} holds values that are not finite.")


def _load_state(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    classifier = set(classifier_names(model))
    expected = {n: t.shape for n, t in model.state_dict().items() if n not in classifier}
    for name, shape in expected.items():
        if name not in state:
            raise BackboneError(f"{path} lacks {name}: it holds weights of another model.")
        if state[name].shape != shape:
            raise BackboneError(
                f"{name} has shape {tuple(state[name].shape)} in {path}, "
                f"but the model needs {tuple(shape)}."
            )
        if not state[name].isfinite().all():
            raise BackboneError(f"{name} in {path} holds values that are not finite.")
    model.load_state_dict({n: state[n] for n in expected}, strict=False)
