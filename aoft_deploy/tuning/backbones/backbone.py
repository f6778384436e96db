"""Create a frozen timm backbone, with timm's own weights or those of a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import timm
from timm.models import get_deprecated_models
from torch import Tensor, nn

from aoft_deploy.errors import BackboneError, UnknownNameError
from aoft_deploy.file_signatures import file_kind
from aoft_deploy.path_kinds import described, missing
from aoft_deploy.texts import one_line
from aoft_deploy.tuning.backbones.identity import Backbone, identify
from aoft_deploy.tuning.backbones.jax_weights import load_npz
from aoft_deploy.tuning.backbones.timm_loading import (
    Loader,
    TimmLoading,
    create_filled,
    create_with_loader,
)
from aoft_deploy.tuning.backbones.weights_file import check_fit, file_weights
from aoft_deploy.tuning.sites.classifier import classifier_names

__all__ = ["create_backbone", "file_classifier", "unknown_backbone"]


def create_backbone(
    name: str,
    *,
    num_classes: int,
    weights: Path | None = None,
    classifier_follows: bool = False,
    **args: Any,
) -> tuple[nn.Module, Backbone]:
    """A pre-trained timm model and its identity.

    Args:
        name: timm name, such as ``vit_base_patch16_224.augreg_in21k``.
        num_classes: Width of the new classifier.
        weights: File with the weights (.safetensors, .pth, .bin, or .npz in the JAX layout). None
            uses timm's own: from the hub, or bundled.
        classifier_follows: Whether the caller fills the new classifier. It gets no initial values
            then, and the model is created in less time.
        args: Further arguments of ``timm.create_model``, such as ``img_size``.

    Raises:
        UnknownNameError: timm has no such model.
        BackboneError: The weights are missing, do not fit, or cannot be downloaded.
    """
    name = get_deprecated_models().get(name) or name
    loader = _timm_loader(name) if weights is None else _file_loader(name, weights, args)
    create = create_with_loader
    if classifier_follows:
        create = partial(create_filled, leave_out=classifier_names)
    model = _create(name, weights, create, loader, num_classes=num_classes, **args)
    origin = "timm" if weights is None else f"file:{Path(weights).name}"
    return model.eval(), identify(model, name=name, origin=origin, args=args)


def file_classifier(name: str, weights: Path) -> dict[str, Tensor]:
    """The classifier in a file of backbone weights; empty if it has none under timm's names.

    Raises:
        UnknownNameError: timm has no such model.
        BackboneError: The file cannot be read or does not fit the model.
    """
    found: dict[str, Tensor] = {}

    def load(model: nn.Module, timm_loading: TimmLoading) -> None:
        if _weights_kind(weights) != "npz":
            state = file_weights(model, timm_loading, weights, _resizes(name, {}))
            found.update({n: state[n] for n in classifier_names(model) if n in state})

    _create(name, weights, create_with_loader, load, num_classes=1)
    return found


def _create(
    name: str,
    weights: Path | None,
    create: Callable[..., nn.Module],
    loader: Loader,
    **args: Any,
) -> nn.Module:
    if not timm.is_model(name.partition(".")[0]):
        raise unknown_backbone(name)
    try:
        return create(name, loader, **args)
    except BackboneError:
        raise
    except Exception as error:  # timm, the hub and the network raise many types
        raise BackboneError(_creation_failure(name, weights, error)) from error


def unknown_backbone(name: str) -> UnknownNameError:
    """The error for a name that timm does not know."""
    hint = "If a module of yours registers it, import that first (`import`)."
    return UnknownNameError("backbone", name, timm.list_models(), hint)


def _creation_failure(name: str, weights: Path | None, error: Exception) -> str:
    reason = one_line(error)
    if weights is not None or isinstance(error, TypeError):
        return f"timm cannot create {name}: {reason}."
    return (
        f"timm cannot load the weights of {name} ({reason}): "
        "check the name and the network, or give a file with `weights`."
    )


def _file_loader(name: str, weights: Path, args: Mapping[str, Any]) -> Loader:
    """A loader that fills the model from a file."""

    def load(model: nn.Module, timm_loading: TimmLoading) -> None:
        if _weights_kind(weights) == "npz":
            load_npz(model, weights)
            return
        state = file_weights(model, timm_loading, weights, _resizes(name, args))
        classifier = set(classifier_names(model))
        trunk = {name: tensor for name, tensor in state.items() if name not in classifier}
        model.load_state_dict(trunk, strict=False)

    return load


def _timm_loader(name: str) -> Loader:
    """A loader that fills the model with timm's own weights, after checking that they fit."""

    def load(model: nn.Module, timm_loading: TimmLoading) -> None:
        original = model.load_state_dict

        def checked(state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
            check_fit(model, state, f"timm's file for {name}", timm_loading.strict)
            return original(state, strict=False, assign=assign)

        vars(model)["load_state_dict"] = checked
        try:
            timm_loading.load()
        finally:
            del vars(model)["load_state_dict"]

    return load


def _weights_kind(weights: Path) -> str:
    if not weights.is_file():
        reason = described(weights, "weights")
        raise BackboneError(f"{weights} {reason}." if reason else missing(weights))
    return file_kind(weights)


def _resizes(name: str, args: Mapping[str, Any]) -> bool:
    """Whether patch kernels may be resampled: FlexiViT, or a given ``patch_size``."""
    return name.startswith("flexivit") or "patch_size" in args
