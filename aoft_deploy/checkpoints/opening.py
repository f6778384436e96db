"""Open a checkpoint of any kind: a ``model.ckpt``, a published RLRR .pth, or a PEFT LoRA folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from timm.data.config import resolve_model_data_config

from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.checkpoints.checkpoint import Checkpoint, parse_checkpoint, read_checkpoint
from aoft_deploy.checkpoints.file_format import checkpoint_file
from aoft_deploy.checkpoints.lora_factors import bypassed_layers
from aoft_deploy.checkpoints.peft_adapter import read_peft_folder
from aoft_deploy.checkpoints.rlrr import is_torch_file, published_preprocessing, read_published
from aoft_deploy.checkpoints.shared_backbone import SharedBackbone
from aoft_deploy.checkpoints.trained_backbone import peft_backbone, trained_backbone
from aoft_deploy.checkpoints.transformers_config import outputs
from aoft_deploy.classes import Classes
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import CheckpointError
from aoft_deploy.tuning.attaching import attach
from aoft_deploy.tuning.backbones.backbone import create_backbone
from aoft_deploy.tuning.backbones.identity import image_size
from aoft_deploy.tuning.methods import get_method
from aoft_deploy.tuning.sites.classifier import classifier_names
from aoft_deploy.tuning.tuned_model import TunedModel

__all__ = ["load", "open_checkpoint"]


def load(
    path: Path | str,
    *,
    backbone: str | None = None,
    weights: Path | str | None = None,
    force: bool = False,
) -> TunedModel:
    """The tuned model of a checkpoint, on a backbone that timm creates.

    Its ``classes``, ``activation`` and ``preprocessing`` are the checkpoint's.

    Args:
        path: The checkpoint or its run's folder, a published RLRR .pth, or a PEFT LoRA folder.
        backbone: timm name to use instead of the one in the checkpoint. A .pth and a folder that
            PEFT wrote contain none, so they need it.
        weights: File with the backbone's weights; None uses timm's own.
        force: Accept a backbone that differs from the one trained on.

    Raises:
        CheckpointError: The file cannot be used, or was trained on another backbone.
        BackboneError: The backbone's weights are missing or do not fit.
    """
    file = None if weights is None else Path(weights)
    tuned, checkpoint = open_checkpoint(path, BackboneSource(backbone, file, force))
    tuned.classes, tuned.preprocessing = checkpoint.classes, checkpoint.preprocessing
    return tuned


def open_checkpoint(
    path: Path | str,
    source: BackboneSource = BackboneSource(),
    shared: SharedBackbone | None = None,
) -> tuple[TunedModel, Checkpoint]:
    """The tuned model of a checkpoint, and the checkpoint itself.

    Args:
        path: The checkpoint or its run's folder, a published RLRR .pth, or a PEFT LoRA folder.
        source: Where the backbone comes from.
        shared: Creates the backbone of a ``model.ckpt``, unless all its weights were trained. The
            models of several checkpoints then share the frozen weights.

    Raises:
        CheckpointError: The file cannot be used, or was trained on another backbone.
        BackboneError: The backbone's weights are missing or do not fit.
    """
    path = checkpoint_file(path)
    if path.is_dir():
        return _open_peft(path, source)
    if source.name is not None and is_torch_file(path):
        return _open_published(path, source.name, source.weights)
    checkpoint = read_checkpoint(path)
    create = create_backbone
    if shared is not None and not get_method(checkpoint.method).everything:
        create = shared
    model, identity = trained_backbone(path, checkpoint, source, create)
    tuned = attach(model, checkpoint.method, backbone=identity, **checkpoint.settings)
    tuned.load_trained(checkpoint.tensors)
    return tuned.eval(), checkpoint


def _open_published(
    path: Path, backbone: str, weights: Path | None
) -> tuple[TunedModel, Checkpoint]:
    """A published RLRR file, which contains neither class names nor preprocessing."""
    tensors = read_published(path)
    count = tensors["head.head.bias"].numel()
    model, identity = create_backbone(
        backbone, num_classes=count, weights=weights, classifier_follows=True
    )
    size = image_size(model)
    if size is None:
        raise CheckpointError(f"{path} needs a plain Vision Transformer, not {backbone}.")
    tuned = attach(model, "rlrr", backbone=identity)
    tuned.load_trained(tensors)
    checkpoint = Checkpoint(
        tuned.method,
        tuned.settings,
        identity,
        Classes(map(str, range(count))),
        published_preprocessing(size),
        tensors,
    )
    return tuned.eval(), checkpoint


def _open_peft(path: Path, source: BackboneSource) -> tuple[TunedModel, Checkpoint]:
    """A PEFT LoRA folder, as our own method ``lora``."""
    folder = read_peft_folder(path)
    if "aoft" in folder.metadata:
        checkpoint = parse_checkpoint(path, folder.metadata["aoft"], {})
        model, identity = trained_backbone(path, checkpoint, source)
    elif source.name is not None:
        model, identity = peft_backbone(folder, source.name, source)
        config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
        count = len(model.get_parameter(classifier_names(model)[0]))
        prepared = Preprocessing.from_timm(config)
        checkpoint = Checkpoint("lora", {}, identity, outputs(path, count), prepared, {})
    else:
        raise CheckpointError(
            f"{path} does not say which timm model it belongs to: name it with `backbone`."
        )
    ranks, tensors = folder.placed(model)
    if not ranks:
        raise CheckpointError(f"{path} changes the classifier only: there is nothing to merge.")
    tuned = attach(model, "lora", backbone=identity, ranks=ranks)
    tuned.load_trained(tensors)
    prepared = checkpoint.preprocessing
    for layer in bypassed_layers(tuned, prepared.height, prepared.width):
        if tensors[f"update.{layer}.b"].any():
            raise CheckpointError(
                f"{path} changes {layer}, whose weight {type(model).__name__} reads without "
                "calling the layer: PEFT's own answers leave that change out until it is merged."
            )
    opened = replace(checkpoint, method=tuned.method, settings=tuned.settings, tensors=tensors)
    return tuned.eval(), opened
