"""One backbone for many checkpoints: its weights are read, checked and hashed once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from aoft_deploy.tuning.backbones.backbone import create_backbone
from aoft_deploy.tuning.backbones.identity import Backbone
from aoft_deploy.tuning.copying import copy_structure
from aoft_deploy.tuning.sites.classifier import classifier_names

__all__ = ["SharedBackbone"]


class SharedBackbone:
    """Creates models of one backbone that share its frozen weights.

    It keeps the backbone of the last call, which a call with the same arguments copies. A copy has
    modules and a classifier of its own; its other parameters are those of the first model, so their
    values must not change.
    """

    def __init__(self) -> None:
        self._created: tuple[Any, nn.Module, Backbone] | None = None

    def __call__(
        self, name: str, *, num_classes: int, weights: Path | None = None, **args: Any
    ) -> tuple[nn.Module, Backbone]:
        """A model whose classifier has no values yet, and its identity; see ``create_backbone``.

        Raises:
            UnknownNameError: timm has no such model.
            BackboneError: The weights are missing, do not fit, or cannot be downloaded.
        """
        args.pop("classifier_follows", None)
        wanted = name, weights, args
        if self._created is None or self._created[0] != wanted:
            self._created = None  # two backbones would need twice the memory
            created = create_backbone(
                name, num_classes=num_classes, weights=weights, classifier_follows=True, **args
            )
            self._created = wanted, *created
        _, model, identity = self._created
        own = set(classifier_names(model))
        memo: dict[int, Any] = {id(p): p for n, p in model.named_parameters() if n not in own}
        copied: Any = copy_structure(model, memo)
        if len(model.get_parameter(classifier_names(model)[-1])) != num_classes:
            copied.reset_classifier(num_classes)
        return copied.eval(), identity
