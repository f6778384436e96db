"""What training changed in a model: how many parameters, and the weights of one layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from aoft_demo.tasks.session import Session
from aoft_demo.tasks.shared_fleet import checkpoint_of

if TYPE_CHECKING:
    from torch import nn

    from aoft_deploy.tuning.tuned_model import TunedModel

__all__ = ["SIDE", "Change", "LayerWeights", "change_of"]

SIDE = 40
"""Rows and columns of a layer's weights that are shown at most."""


@dataclass(frozen=True)
class LayerWeights:
    """The layer that changed most, relative to its weights.

    Attributes:
        name: Name of the layer.
        shape: Rows and columns of its weights.
        before: The upper left part of the weights before training, at most (SIDE, SIDE).
        change: What training added to that part.
        ratio: Length of the whole change as a share of the weights' own (Frobenius norms).
    """

    name: str
    shape: tuple[int, int]
    before: NDArray[np.float32]
    change: NDArray[np.float32]
    ratio: float


@dataclass(frozen=True)
class Change:
    """What training changed.

    Attributes:
        trained: Number of trained parameters, without the classifier's.
        classifier: Number of the classifier's parameters.
        total: Number of the backbone's parameters, without the classifier's.
        layer: The layer that changed most; None if no weight changed.
    """

    trained: int
    classifier: int
    total: int
    layer: LayerWeights | None


def change_of(session: Session, name: str) -> Change:
    """Compare a task's merged model with its backbone before training.

    Raises:
        AoftError: The task has no checkpoint, it was removed in the meantime, or its backbone
            cannot be created.
    """
    with session.using(name) as task:
        path = checkpoint_of(task, name)
        return _change(path, path.stat().st_mtime_ns, session.shared.weights)


@lru_cache(maxsize=32)
def _change(path: Path, modified_ns: int, weights: Path | None) -> Change:
    """The comparison for a file; the time of the last change is part of the cache key."""
    from aoft_deploy.checkpoints.backbone_source import BackboneSource
    from aoft_deploy.checkpoints.opening import open_checkpoint
    from aoft_deploy.checkpoints.trained_backbone import trained_backbone

    source = BackboneSource(weights=weights)
    tuned, checkpoint = open_checkpoint(path, source)
    before, _ = trained_backbone(path, checkpoint, source)
    size = {name: tensor.numel() for name, tensor in before.named_parameters()}
    classifier = sum(size[name] for name in tuned.classifier)
    trained = sum(tensor.numel() for tensor in checkpoint.tensors.values()) - classifier
    return Change(trained, classifier, sum(size.values()) - classifier, _layer(tuned, before))


def _layer(tuned: TunedModel, before: nn.Module) -> LayerWeights | None:
    """The layer with the largest change, relative to its weights."""
    import torch

    from aoft_deploy.tuning.merging import merge
    from aoft_deploy.tuning.sites.discovery import find_sites
    from aoft_deploy.tuning.sites.site import LINEAR_ROLES

    best, merged = None, merge(tuned)
    names = {name for name, _ in before.named_parameters()}
    with torch.no_grad():
        for site in find_sites(before):
            if site.role not in LINEAR_ROLES or f"{site.module}.weight" not in names:
                continue
            old, new = (
                model.get_parameter(f"{site.module}.weight").double().flatten(1)[slice(*site.rows)]
                for model in (before, merged)
            )
            ratio = float((new - old).norm() / (old.norm() or 1))
            if ratio > (best.ratio if best else 1e-6):
                part, change = old[:SIDE, :SIDE], (new - old)[:SIDE, :SIDE]
                best = LayerWeights(
                    site.name,
                    (old.shape[0], old.shape[1]),
                    part.float().numpy(),
                    change.float().numpy(),
                    ratio,
                )
    return best
