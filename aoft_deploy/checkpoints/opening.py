"""model.ckpt: one safetensors file with a task's trained numbers and all that export needs.

The tensors are ``update.SITE.PARAMETER`` and ``head.NAME``. The metadata's one entry, ``aoft``, is
JSON with the format's version, the method and its settings, the backbone's identity, the classes
and the preprocessing. Nothing in it is ever executed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import timm
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from aoft_deploy.checkpoints.checkpoint import Checkpoint, parse_checkpoint, read_checkpoint
from aoft_deploy.checkpoints.lora_factors import bypassed_layers
from aoft_deploy.checkpoints.peft_adapter import PeftFolder, read_peft_folder
from aoft_deploy.checkpoints.rlrr import is_published, published_preprocessing, read_published
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import CheckpointError, UnknownNameError
from aoft_deploy.tuning.attaching import attach
from aoft_deploy.tuning.backbones.architecture import CHANGED, called
from aoft_deploy.tuning.backbones.backbone import create_backbone, file_classifier
from aoft_deploy.tuning.backbones.identity import Backbone, difference, image_size
from aoft_deploy.tuning.sites.classifier import classifier_names
from aoft_deploy.tuning.tuned_model import TunedModel

__all__ = ["load", "open_checkpoint"]


def load(
    path: Path | str,
    *,
    backbone: str | None = None,
    weights: Path | None = None,
    force: bool = False,
) -> TunedModel:
    """The tuned model of a checkpoint, its backbone made by timm.

    Args:
        path: The checkpoint, a published RLRR .pth, or a PEFT LoRA folder.
        backbone: timm name to use instead of the one in the checkpoint; a .pth needs it, and a
            folder that PEFT wrote.
        weights: File with the backbone's weights; None takes timm's own.
        force: Accept a backbone whose weights differ from those trained on.

    Raises:
        CheckpointError: The file cannot be used, or was trained on other backbone weights.
        BackboneError: The backbone's weights are missing or do not fit.
    """
    return open_checkpoint(path, backbone=backbone, weights=weights, force=force)[0]


def open_checkpoint(
    path: Path | str,
    *,
    backbone: str | None = None,
    weights: Path | None = None,
    force: bool = False,
) -> tuple[TunedModel, Checkpoint]:
    """As ``load``, with the checkpoint's description beside the model."""
    path = Path(path)
    if path.is_dir():
        return _open_peft(path, backbone, weights, force)
    if backbone is not None and is_published(path):
        return _open_published(path, backbone, weights)
    checkpoint = read_checkpoint(path)
    model, found = _trained_backbone(path, checkpoint, backbone, weights, force)
    tuned = attach(model, checkpoint.method, backbone=found, **checkpoint.settings)
    tuned.load_trained(checkpoint.tensors)
    return tuned.eval(), checkpoint


def _trained_backbone(
    path: Path, checkpoint: Checkpoint, backbone: str | None, weights: Path | None, force: bool
) -> tuple[nn.Module, Backbone]:
    """The backbone that a checkpoint was trained on, with a classifier of its width."""
    trained_on = checkpoint.backbone
    if weights is None and backbone is None and trained_on.origin != "timm":
        source = trained_on.origin.removeprefix("file:")
        raise CheckpointError(
            f"{path} was trained on {trained_on.name} with weights that timm cannot load by name "
            f"({source}): give them with --backbone-weights."
        )
    model, found = create_backbone(
        backbone or trained_on.name,
        num_classes=len(checkpoint.classes),
        weights=weights,
        **trained_on.args,
    )
    size, fed = image_size(model), checkpoint.preprocessing.size
    if size is not None and size != fed:
        raise CheckpointError(
            f"{path} prepares images of {fed} pixels, but {found.name} takes {size}."
        )
    if not force:
        _check_backbone(path, found, trained_on)
    return model, found


def _check_backbone(path: Path, found: Backbone, trained_on: Backbone) -> None:
    """Refuse other weights, and another architecture with the same weights."""
    if found.digest != trained_on.digest:
        raise CheckpointError(
            f"{path} was trained on {trained_on.name} with weights {trained_on.digest[:12]}, but "
            f"these are {found.name} with weights {found.digest[:12]}: give the right ones, or "
            "accept the difference with --force."
        )
    if trained_on.origin.startswith(CHANGED):
        raise CheckpointError(
            f"{path} was trained on a model that timm does not make as "
            f"{called(trained_on.name, trained_on.args)} ({difference(found, trained_on)}): attach "
            "its method to that model in Python, or accept the difference with --force."
        )
    if why := difference(found, trained_on):
        raise CheckpointError(
            f"{path} was trained on {trained_on.name}, but {found.name} computes something else "
            f"with the same weights ({why}): give --backbone {trained_on.name}, or accept the "
            "difference with --force."
        )


def _open_published(
    path: Path, backbone: str, weights: Path | None
) -> tuple[TunedModel, Checkpoint]:
    """A published RLRR file on its backbone; it names neither classes nor preprocessing."""
    tensors = read_published(path)
    count = tensors["head.head.bias"].numel()
    model, identity = create_backbone(backbone, num_classes=count, weights=weights)
    size = image_size(model)
    if size is None:
        raise CheckpointError(f"{path} belongs on a plain Vision Transformer, not on {backbone}.")
    tuned = attach(model, "rlrr", backbone=identity)
    tuned.load_trained(tensors)
    checkpoint = Checkpoint(
        tuned.method,
        tuned.settings,
        identity,
        tuple(str(i) for i in range(count)),
        published_preprocessing(size),
        tensors,
    )
    return tuned.eval(), checkpoint


def _open_peft(
    path: Path, backbone: str | None, weights: Path | None, force: bool
) -> tuple[TunedModel, Checkpoint]:
    """A PEFT LoRA folder on its backbone, as our own method ``lora``."""
    folder = read_peft_folder(path)
    if "aoft" in folder.metadata:
        checkpoint = parse_checkpoint(path, folder.metadata["aoft"], {})
        model, found = _trained_backbone(path, checkpoint, backbone, weights, force)
    elif backbone is not None:
        model, found = _named_backbone(folder, backbone, weights)
        config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
        count = len(model.get_parameter(classifier_names(model)[0]))
        classes = tuple(str(i) for i in range(count))
        if not force:
            _check_base(folder, model, found)
        checkpoint = Checkpoint("lora", {}, found, classes, Preprocessing.from_timm(config), {})
    else:
        raise CheckpointError(
            f"{path} does not say which timm model it belongs to: name it with --backbone."
        )
    ranks, tensors = folder.placed(model)
    if not ranks:
        raise CheckpointError(f"{path} changes the classifier alone: it has nothing to merge.")
    tuned = attach(model, "lora", backbone=found, ranks=ranks)
    tuned.load_trained(tensors)
    for layer in bypassed_layers(tuned, checkpoint.preprocessing.size):
        if tensors[f"update.{layer}.b"].any():
            raise CheckpointError(
                f"{path} changes {layer}, whose weight {type(model).__name__} reads without "
                "calling the layer: PEFT's own answers leave that change out until it is merged."
            )
    own = replace(checkpoint, method=tuned.method, settings=tuned.settings, tensors=tensors)
    return tuned.eval(), own


def _check_base(folder: PeftFolder, model: nn.Module, found: Backbone) -> None:
    """Refuse a backbone of another architecture than PEFT says the adapter was trained on."""
    config, called = folder.config, type(model).__name__
    base = config.base.removeprefix("timm/")
    wanted = replace(found, name=base)
    why = difference(found, wanted) if timm.is_model(base) else ""
    parent, kind = config.base_class
    if parent.startswith("timm.") and kind != called:
        base, why = f"a {kind}", f"the model is a {called}"
    if why:
        raise CheckpointError(
            f"{folder.path} was trained on {base}, but {found.name} computes something else ({why})"
            ": name the right backbone with --backbone, or accept the difference with --force."
        )


def _named_backbone(
    folder: PeftFolder, name: str, weights: Path | None
) -> tuple[nn.Module, Backbone]:
    """The backbone of a folder that does not describe its task.

    Where it holds no classifier, the pre-trained one stays, as it does in PEFT's model.
    """
    if folder.num_classes is not None:
        return create_backbone(name, num_classes=folder.num_classes, weights=weights)
    head: dict[str, Tensor] = {}
    if weights is None:
        count = _pretrained_width(name)
    else:
        head = file_classifier(name, weights)
        count = len(next(iter(head.values()), ()))
    if not count:
        raise CheckpointError(
            f"{folder.path} holds no classifier (modules_to_save), and {weights or name} none "
            "either: train one and save it with the adapter."
        )
    model, identity = create_backbone(name, num_classes=count, weights=weights)
    model.load_state_dict(head, strict=False)
    return model, identity


def _pretrained_width(name: str) -> int:
    """Number of classes that a timm model was pre-trained with; 0 where it has no classifier."""
    if not timm.is_model(name.partition(".")[0]):
        raise UnknownNameError("backbone", name, timm.list_models())
    config = timm.get_pretrained_cfg(name)
    return int(config.num_classes) if config is not None else 0
