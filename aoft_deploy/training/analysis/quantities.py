"""The quantities that AOFT (arXiv 2507.13260) argues with, for any checkpoint.

The paper observes that the rows and columns of pre-trained weights stand nearly at right angles,
that the vectors of trained down and up projections do not, and that a small spectral norm bounds
the error of generalisation. Here are those angles, those norms, and how far each AO(q) is from
strictly orthogonal, which training is free to change.

The vectors of a down or up projection (N, d) are its d columns, which AO(q) generates; those of a
weight (out, in) are its rows and its columns.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.checkpoints.opening import open_checkpoint
from aoft_deploy.errors import CheckpointError
from aoft_deploy.training.analysis.geometry import (
    Angles,
    change_norm,
    spectral_norm,
)
from aoft_deploy.training.analysis.orthogonality import deviations, orthogonality, projections
from aoft_deploy.tuning.backbones.backbone import create_backbone
from aoft_deploy.tuning.exact_folding import exact_deltas
from aoft_deploy.tuning.merging import merge
from aoft_deploy.tuning.methods import get_method
from aoft_deploy.tuning.sites.discovery import find_sites
from aoft_deploy.tuning.sites.site import LINEAR_ROLES, Site
from aoft_deploy.tuning.tuned_model import TunedModel
from aoft_deploy.tuning.updated_layers import UpdatedModule
from aoft_deploy.tuning.updates.delta import OutputDelta, PromptDelta, WeightDelta, matrix_shape
from aoft_deploy.tuning.updates.update import Update

__all__ = ["analyse", "analyse_file"]


def analyse_file(
    path: Path,
    *,
    backbone: str | None = None,
    weights: Path | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """``analyse`` for a checkpoint, with its course over training from the metrics beside it.

    Args:
        path: The checkpoint or what else ``open_checkpoint`` reads, or a run's folder.
        backbone: As for ``open_checkpoint``.
        weights: As for it.
        force: As for it.

    Returns:
        What ``analyse`` does, with ``file``, ``method``, ``settings``, ``backbone``; ``history``,
        the deviations of every epoch; and ``notes``, sentences on what there is not.

    Raises:
        CheckpointError: The file cannot be used, or its method trains the classifier alone.
        BackboneError: The backbone's weights are missing or do not fit.
    """
    path = path / "model.ckpt" if (path / "model.ckpt").is_file() else path
    tuned, _ = open_checkpoint(path, BackboneSource(backbone, weights, force))
    before = None
    if get_method(tuned.method).everything:
        known = tuned.identity
        before, _ = create_backbone(
            known.name, num_classes=tuned.num_classes, weights=weights, **known.args
        )
    elif not tuned.updates:
        raise CheckpointError(
            f"{path} was trained with {tuned.method}, which changes the classifier alone: there is "
            "nothing to analyse."
        )
    history, missing = _history(path.with_name("metrics.jsonl"), orthogonality(tuned))
    result = analyse(tuned, before)
    return {
        "file": str(path),
        "method": tuned.method,
        "settings": tuned.settings,
        "backbone": tuned.identity.to_dict(),
        **result,
        "history": history,
        "notes": [*missing, *_notes(tuned.method, result["layers"])],
    }


def _history(path: Path, now: Mapping[str, float]) -> tuple[list[dict[str, float]], list[str]]:
    """Every epoch's deviations from a run's metrics, or why there are none.

    The metrics are of the checkpoint's own run only if one epoch has the checkpoint's deviations.
    """
    unknown = "so the course over training is not known."
    if not now:
        return [], []
    if not path.is_file():
        return [], [f"There is no {path}, {unknown}"]
    try:
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        epochs = [{k: float(line[k]) for k in ("epoch", *now)} for line in lines if "lr" in line]
    except (ValueError, TypeError, KeyError, RecursionError):
        epochs = []
    if not epochs:
        return [], [f"{path} holds no deviations, {unknown}"]
    for epoch in epochs:
        if all(math.isclose(epoch[k], now[k], rel_tol=1e-6, abs_tol=1e-12) for k in now):
            return epochs, []
    return [], [f"{path} is of another run, {unknown}"]


def _notes(method: str, layers: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    norms = [layer["spectral_norms"] for layer in layers]
    changes = [n["change"] for n in norms if "change" in n]
    if not changes:
        yield f"{method} changes no weight: there is no ΔW."
    elif not any(changes):
        yield "ΔW is zero in every layer."
    if not any({"down", "up", "prompts"}.intersection(n) for n in norms):
        yield f"{method} has neither down and up matrices nor prompts."
    if not any(layer["deviations"] for layer in layers):
        yield f"{method} has no AO matrices, so there is no deviation from orthogonality to show."


@torch.no_grad()
def analyse(tuned: TunedModel, before: nn.Module | None = None) -> dict[str, Any]:
    """Angles, spectral norms and deviations of a tuned model, as JSON values.

    Args:
        tuned: The model, on the CPU.
        before: The plain backbone as it was before full fine-tuning, which keeps no base weights;
            other methods do not need it.

    Returns:
        ``layers``, a list of every linear map of the backbone and every block's prompts, and
        ``angles``, the angles of all layers together by kind of matrix: ``rows`` and ``columns`` of
        the backbone's weights, ``down``, ``up``, ``prompts``.
    """
    generator = torch.Generator().manual_seed(0)
    total: dict[str, Angles] = defaultdict(Angles)
    layers = []
    for layer in _layers(tuned, before):
        update = tuned.updates.get(layer.site.name)
        matrices = {} if update is None else projections(update)
        norms = {kind: spectral_norm(matrix) for kind, matrix in matrices.items()}
        families = {kind: matrix.mT for kind, matrix in matrices.items()}
        if layer.weight is not None:
            norms = {"weight": spectral_norm(layer.weight), **layer.change(), **norms}
            families = {"rows": layer.weight, "columns": layer.weight.mT, **families}
        found = {kind: Angles.of(vectors, generator) for kind, vectors in families.items()}
        for kind, part in found.items():
            total[kind] += part
        layers.append(
            {
                **_named(layer.site),
                "vectors": {kind: list(family.shape) for kind, family in families.items()},
                "angles": {kind: part.summary() for kind, part in found.items() if part.pairs},
                "spectral_norms": norms,
                "change_ratio": _ratio(norms),
                "deviations": {} if update is None else deviations(update),
            }
        )
    kinds = {kind: _pooled(part) for kind, part in total.items() if part.pairs}
    return {"layers": layers, "angles": kinds}


def _ratio(norms: Mapping[str, float]) -> float | None:
    """‖ΔW‖₂ / ‖W‖₂ where both exist."""
    return norms["change"] / norms["weight"] if "change" in norms and norms["weight"] else None


def _pooled(part: Angles) -> dict[str, Any]:
    histograms = {"counts": part.counts.tolist(), "random_counts": part.random.tolist()}
    return {"matrices": part.matrices, **part.summary(), **histograms}


@dataclass(frozen=True)
class _Layer:
    """A site with its weight before training, as a float64 matrix, and what training did to it.

    Attributes:
        site: Where it is.
        weight: W, or None for prompts.
        delta: The change by an update.
        trained: W after full fine-tuning.
    """

    site: Site
    weight: Tensor | None = None
    delta: WeightDelta | OutputDelta | None = None
    trained: Tensor | None = None

    def change(self) -> dict[str, float]:
        """‖ΔW‖₂ if training could change W."""
        assert self.weight is not None
        if self.trained is not None:
            return {"change": spectral_norm(self.trained - self.weight)}
        return {} if self.delta is None else {"change": change_norm(self.delta, self.weight)}


def _layers(tuned: TunedModel, before: nn.Module | None) -> Iterator[_Layer]:
    plain = merge(tuned)
    bases = {
        path: module.base
        for path, module in tuned.backbone.named_modules()
        if isinstance(module, UpdatedModule)
    }
    deltas = exact_deltas(tuned.updates.values())
    for site in _shown(find_sites(plain), tuned.updates):
        update = tuned.updates.get(site.name)
        delta = None if update is None else deltas[update]
        if isinstance(delta, PromptDelta):
            yield _Layer(site)
            continue
        after = plain.get_submodule(site.module)
        owner = bases.get(site.module, after)
        if before is not None:
            owner = before.get_submodule(site.module)
        trained = None if before is None else _matrix(site, after, delta)
        yield _Layer(site, _matrix(site, owner, delta), delta, trained)


def _shown(sites: Sequence[Site], updates: Mapping[str, Update]) -> Iterator[Site]:
    """Every linear map once, and every block with prompts.

    A fused qkv is three maps, unless it is updated or known only as a whole.
    """
    whole = {s.module for s in sites if s.role == "qkv" and s.name in updates}
    whole |= {s.module for s in sites if s.part and s.refusal}
    for site in sites:
        if site.role == "block":
            if site.name in updates:
                yield site
        elif site.role in LINEAR_ROLES:
            is_fused = site.role == "qkv" or site.part
            if not is_fused or site.part != (site.module in whole):
                yield site


def _matrix(site: Site, owner: nn.Module, delta: object) -> Tensor:
    """W as its update sees it: a change of the output has one row for each channel."""
    weight = owner.get_parameter("weight").detach().cpu().double()
    if isinstance(delta, OutputDelta):
        return weight.reshape(len(weight), -1)
    return weight.reshape(matrix_shape(weight))[slice(*site.rows)]


def _named(site: Site) -> dict[str, str]:
    """A layer's full name, the numbers of its block, and its role there."""
    if site.role == "block":
        path, role = site.name, "prompts"
    else:
        path, _, role = site.name.rpartition(".")
        if role.isdigit():
            path, _, parent = path.rpartition(".")
            role = f"{parent}.{role}"
        for part in (".attn", ".mlp"):
            path = path.partition(part)[0]
    numbers = re.findall(r"\d+", path)
    return {"name": site.name, "block": ".".join(numbers), "role": role.removesuffix("_proj")}
