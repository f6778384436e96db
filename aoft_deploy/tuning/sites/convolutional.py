"""Sites of convolutional networks: ResNet and ConvNeXt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from aoft_deploy.tuning.sites.attention_classes import (
    LEAF_ROLES,
)
from aoft_deploy.tuning.sites.classifier import classifier_names
from aoft_deploy.tuning.sites.site import (
    SUBCLASS_REFUSAL,
    Site,
    is_map,
    map_site,
    output_site,
)

__all__ = ["CONVOLUTIONAL", "convolutional_sites"]

CONVOLUTIONAL = {("timm.models.convnext", "ConvNeXt"), ("timm.models.resnet", "ResNet")}
"""Classes of convolutional networks whose convolutions, MLPs and norms are sites."""


def convolutional_sites(model: nn.Module) -> Iterator[Site]:
    """The sites of a model without attention: its convolutions, linear maps and norms."""
    head = {name.rpartition(".")[0] for name in classifier_names(model)}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if name in head or weight is None or {"se", "pre_logits"}.intersection(name.split(".")):
            continue
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            leaf = name.rpartition(".")[2]
            role = LEAF_ROLES.get(leaf, "conv" if isinstance(module, nn.Conv2d) else "other")
            refusal = f"{name} is a {type(module).__name__}, {SUBCLASS_REFUSAL}"
            refusal = "" if is_map(module) and role != "other" else refusal
            yield replace(map_site(name, role, module), refusal=refusal)
        elif weight.dim() == 1:
            batch_norm = isinstance(module, nn.BatchNorm2d)
            yield output_site(name, "batch_norm" if batch_norm else "norm", module)
