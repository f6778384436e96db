"""Create the backbone that a checkpoint was trained on, and refuse a different one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import timm
from torch import Tensor, nn

from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.checkpoints.checkpoint import Checkpoint
from aoft_deploy.checkpoints.peft_adapter import PeftFolder
from aoft_deploy.errors import CheckpointError, UnknownNameError
from aoft_deploy.tuning.backbones.architecture import CHANGED, architecture_label
from aoft_deploy.tuning.backbones.backbone import create_backbone, file_classifier
from aoft_deploy.tuning.backbones.identity import Backbone, difference, image_size

__all__ = ["peft_backbone", "trained_backbone"]


def trained_backbone(
    path: Path,
    checkpoint: Checkpoint,
    source: BackboneSource,
    create: Callable[..., tuple[nn.Module, Backbone]] = create_backbone,
) -> tuple[nn.Module, Backbone]:
    """The backbone of a checkpoint that identifies it, with an empty classifier for its classes.

    Args:
        path: Where the checkpoint was read, for messages.
        checkpoint: The checkpoint.
        source: Where the backbone comes from.
        create: Creates it: ``create_backbone``, or a ``SharedBackbone`` if none of the
            checkpoint's parameters is one of the backbone's.

    Raises:
        CheckpointError: The backbone differs from the one trained on, or takes images of another
            size.
        BackboneError: The backbone's weights are missing or do not fit.
    """
    trained_on = checkpoint.backbone
    if source.weights is None and source.name is None and trained_on.origin != "timm":
        origin = trained_on.origin.removeprefix("file:")
        raise CheckpointError(
            f"{path} was trained on {trained_on.name} with weights that timm cannot load by name "
            f"({origin}): give them with `weights`."
        )
    model, found = create(
        source.name or trained_on.name,
        num_classes=len(checkpoint.classes),
        weights=source.weights,
        classifier_follows=True,
        **trained_on.args,
    )
    size, prepared = image_size(model), checkpoint.preprocessing.size
    if size is not None and size != prepared:
        raise CheckpointError(
            f"{path} prepares images of {prepared} pixels, but {found.name} takes {size}."
        )
    if not source.force:
        _check_same(path, found, trained_on)
    return model, found


def _check_same(path: Path, found: Backbone, trained_on: Backbone) -> None:
    """Refuse other weights, and another architecture with the same weights."""
    if found.digest != trained_on.digest:
        raise CheckpointError(
            f"{path} was trained on {trained_on.name} with weights {trained_on.digest[:12]}, but "
            f"these are {found.name} with weights {found.digest[:12]}: give the right ones, or "
            "accept the difference with `force=True`."
        )
    if trained_on.origin.startswith(CHANGED):
        label = architecture_label(trained_on.name, trained_on.args)
        raise CheckpointError(
            f"{path} was trained on a model that timm does not create as {label} "
            f"({difference(found, trained_on)}): attach its method to that model in Python, or "
            "accept the difference with `force=True`."
        )
    if reason := difference(found, trained_on):
        raise CheckpointError(
            f"{path} was trained on {trained_on.name}, but {found.name} computes something else "
            f'with the same weights ({reason}): give `backbone="{trained_on.name}"`, or accept the '
            "difference with `force=True`."
        )


def peft_backbone(
    folder: PeftFolder, name: str, source: BackboneSource
) -> tuple[nn.Module, Backbone]:
    """The backbone of a folder that PEFT wrote, which identifies neither backbone nor task.

    A folder without a classifier keeps the pre-trained one, as PEFT's model does.

    Args:
        folder: The folder.
        name: timm name of the backbone.
        source: Where the backbone comes from.

    Raises:
        CheckpointError: There is no classifier, or the folder was trained on another architecture.
        UnknownNameError: timm has no such model.
        BackboneError: The backbone's weights are missing or do not fit.
    """
    weights = source.weights
    count, classifier = folder.num_classes, dict[str, Tensor]()
    if count is None and weights is None:
        count = _pretrained_classes(name)
    elif count is None:
        assert weights is not None
        classifier = file_classifier(name, weights)
        count = len(next(iter(classifier.values()), ()))
    if not count:
        raise CheckpointError(
            f"{folder.path} holds no classifier (modules_to_save), and {weights or name} none "
            "either: train one and save it with the adapter."
        )
    model, identity = create_backbone(name, num_classes=count, weights=weights)
    model.load_state_dict(classifier, strict=False)
    if not source.force:
        _check_base(folder, model, identity)
    return model, identity


def _pretrained_classes(name: str) -> int:
    """Number of classes that a timm model was pre-trained with; 0 if it has no classifier."""
    if not timm.is_model(name.partition(".")[0]):
        raise UnknownNameError("backbone", name, timm.list_models())
    config = timm.get_pretrained_cfg(name)
    return int(config.num_classes) if config is not None else 0


def _check_base(folder: PeftFolder, model: nn.Module, found: Backbone) -> None:
    """Refuse an architecture other than the one in the adapter's config."""
    config, model_class = folder.config, type(model).__name__
    base = config.base.removeprefix("timm/")
    wanted = replace(found, name=base)
    reason = difference(found, wanted) if timm.is_model(base) else ""
    library, base_class = config.base_class
    if library.startswith("timm.") and base_class != model_class:
        base, reason = f"a {base_class}", f"the model is a {model_class}"
    if reason:
        raise CheckpointError(
            f"{folder.path} was trained on {base}, but {found.name} computes something else "
            f"({reason}): name the right backbone with `backbone`, or accept the difference with "
            "`force=True`."
        )
