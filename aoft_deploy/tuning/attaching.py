"""Attach: freeze a timm model and put a method's updates at its sites."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from aoft_deploy.errors import AttachError
from aoft_deploy.tuning.backbones.identity import Backbone, identify
from aoft_deploy.tuning.method import Build
from aoft_deploy.tuning.methods import get_method
from aoft_deploy.tuning.prompted_blocks import place_prompts
from aoft_deploy.tuning.sites.classifier import classifier_names
from aoft_deploy.tuning.sites.discovery import find_sites
from aoft_deploy.tuning.sites.site import Site
from aoft_deploy.tuning.tuned_model import TunedModel
from aoft_deploy.tuning.updated_layers import UpdatedModule, UpdatedVector
from aoft_deploy.tuning.updates.update import Update

__all__ = ["attach"]


def attach(
    model: nn.Module,
    method: str = "aoft-lora-star",
    *,
    seed: int = 0,
    backbone: Backbone | None = None,
    **settings: Any,
) -> TunedModel:
    """Put a method's updates into a model, and freeze all parameters except the classifier's.

    The model is changed in place; its weights keep their values.

    Args:
        model: A plain timm model with a classifier.
        method: One of ``method_names()``.
        seed: Seed of the updates' initial values.
        backbone: Identity of the model, from ``create_backbone``; None computes it.
        settings: The method's settings, such as ``rank=16``.

    Returns:
        The model, ready for training.

    Raises:
        UnknownNameError: Unknown method or setting.
        SettingError: A setting outside its range.
        AttachError: The model has no site for the method, or no classifier.
        BackboneError: ``backbone`` is None and the model does not record its timm name.
    """
    chosen = get_method(method)
    values = chosen.settings(settings)
    classifier = classifier_names(model)
    placed: list[tuple[Site, Update]] = []
    if chosen.build is not None:
        sites = find_sites(model)
        values = chosen.resolved(values, sites)
        placed = _build(chosen.build, sites, values, torch.Generator().manual_seed(seed))
        if not placed:
            known = ", ".join(sorted({site.role for site in sites} - {"other"}))
            needed = ["block"] if "deep" in values else ["bias"]
            wanted = " or ".join(values.get("targets", needed))
            raise AttachError(
                f"{method} found no {wanted} in {type(model).__name__}, which has {known}."
            )
    identity = backbone or identify(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(chosen.everything or name in classifier)
    _place(model, placed)
    updates = {site.name: update for site, update in placed}
    return TunedModel(model, method, values, updates, identity, chosen.everything)


def _build(
    build: Build, sites: Iterable[Site], settings: Mapping[str, Any], generator: torch.Generator
) -> list[tuple[Site, Update]]:
    placed = []
    for site in sites:
        update = build(site, settings, generator)
        if update is not None:
            if site.refusal:
                raise AttachError(site.refusal)
            placed.append((site, update))
    return placed


def _place(model: nn.Module, placed: list[tuple[Site, Update]]) -> None:
    """Wrap each layer that owns a site with its updates."""
    layers: dict[str, list[tuple[Site, Update]]] = defaultdict(list)
    orders: dict[str, tuple[str, ...]] = {}
    prompted: list[tuple[Site, Update]] = []
    for site, update in placed:
        if site.tensor == "weight":
            layers[site.module].append((site, update))
        elif site.tensor == "tokens":
            prompted.append((site, update))
        else:
            owner = model.get_submodule(site.module)
            order = orders.setdefault(site.module, tuple(owner._parameters))
            vector = UpdatedVector(update, order)
            parametrize.register_parametrization(owner, site.tensor, vector)
    for path, pairs in layers.items():
        base = model.get_submodule(path)
        all_rows = (0, len(base.weight))  # type: ignore[arg-type]
        updates = [(site.rows if site.part else all_rows, update) for site, update in pairs]
        model.set_submodule(path, UpdatedModule(base, updates, pairs[0][0].absorber), strict=True)
    place_prompts(model, prompted)
