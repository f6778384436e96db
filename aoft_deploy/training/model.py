"""The model and the preprocessing that training starts with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from timm.data.config import resolve_model_data_config
from timm.layers.drop import DropPath
from torch import nn

from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import SettingError
from aoft_deploy.training.settings import TrainingSettings
from aoft_deploy.tuning.attaching import attach
from aoft_deploy.tuning.backbones.backbone import create_backbone
from aoft_deploy.tuning.backbones.identity import image_size
from aoft_deploy.tuning.methods import get_method
from aoft_deploy.tuning.tuned_model import TunedModel

__all__ = [
    "create_model",
    "is_head",
    "model_preprocessing",
    "only_depth_is_random",
    "parameter_counts",
]


def create_model(settings: TrainingSettings, num_classes: int) -> TunedModel:
    """The backbone with the method's updates and a fresh classifier.

    Args:
        settings: Gives the backbone, the method, the input size and the seed.
        num_classes: Width of the classifier.

    Raises:
        UnknownNameError: Unknown backbone, method or method setting.
        SettingError: A learning rate for updates that the method does not have.
        BackboneError: The backbone's weights are missing or do not fit.
        AttachError: The backbone has no site for the method.
    """
    method = get_method(settings.method)
    values = method.settings(settings.method_settings)
    if method.build is None and not method.everything and settings.lr is not None:
        raise SettingError(
            f"{method.name} has no updates, so `lr` has no effect: set the classifier's with "
            "`head_lr`."
        )
    args: dict[str, Any] = {} if settings.img_size is None else {"img_size": settings.img_size}
    depth: dict[str, Any] = {"drop_path_rate": settings.drop_path} if settings.drop_path else {}
    model, identity = create_backbone(
        settings.backbone,
        num_classes=num_classes,
        weights=settings.backbone_weights,
        **args,
        **depth,
    )
    identity = replace(identity, args=args)  # stochastic depth is used in training only
    tuned = attach(model, settings.method, seed=settings.seed, backbone=identity, **values)
    source = torch.Generator().manual_seed(settings.seed)
    for name, parameter in tuned.trained().items():
        if is_head(name):
            if parameter.dim() >= 2:
                nn.init.trunc_normal_(parameter, std=0.02, generator=source)
            else:
                nn.init.zeros_(parameter)
    return tuned


def is_head(name: str) -> bool:
    """Whether a trained parameter of this name belongs to the classifier."""
    return name.startswith("head.")


def parameter_counts(tuned: TunedModel) -> tuple[int, int]:
    """Number of trained parameters of the updates, or of the backbone, and of the classifier."""
    sizes = {name: parameter.numel() for name, parameter in tuned.trained().items()}
    head = sum(size for name, size in sizes.items() if is_head(name))
    return sum(sizes.values()) - head, head


def only_depth_is_random(model: nn.Module) -> None:
    """Put stochastic depth into training mode and everything else into evaluation mode.

    Frozen layers must compute the same as after training: BatchNorm keeps its statistics, and
    dropout of the backbone is off.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, DropPath):
            module.train()


def model_preprocessing(tuned: TunedModel, settings: TrainingSettings) -> Preprocessing:
    """The backbone's default preprocessing, with the changes of the settings.

    Raises:
        SettingError: The backbone's input is not a square RGB image, or a setting is outside its
            range.
    """
    config = resolve_model_data_config(tuned.backbone)  # type: ignore[no-untyped-call]
    own = image_size(tuned.backbone)  # a user's model may differ from timm's configuration
    changes = {
        "size": settings.img_size or (own if isinstance(own, int) else None),
        "crop_mode": settings.crop_mode,
        "crop_pct": settings.crop_pct,
    }
    given: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
    return replace(Preprocessing.from_timm(config), **given)
