"""The projections of updates, and the deviation of AOFT's from orthogonality."""

from __future__ import annotations

import math
from collections import defaultdict

from torch import Tensor

from aoft_deploy.training.analysis.geometry import (
    ao_columns,
    deviation,
)
from aoft_deploy.tuning.tuned_model import TunedModel
from aoft_deploy.tuning.updates.aoft import AoftLowRank, AoftPrompts
from aoft_deploy.tuning.updates.low_rank import LowRank
from aoft_deploy.tuning.updates.prompts import Prompts
from aoft_deploy.tuning.updates.update import Update

__all__ = ["deviations", "orthogonality", "projections"]


def projections(update: Update) -> dict[str, Tensor]:
    """Matrices (N, d) of an update by kind: down and up, or prompts; empty without them."""
    if isinstance(update, AoftLowRank | AoftPrompts):
        d, strict = update.options.rank, update.options.strict
        vectors = _ao_vectors(update).items()
        return {kind: ao_columns(q.double(), d, strict=strict) for kind, q in vectors}
    if isinstance(update, LowRank):
        return {"down": update.a.detach().cpu().double().mT, "up": update.b.detach().cpu().double()}
    if isinstance(update, Prompts):
        return {"prompts": update.tokens.detach().cpu().double().mT}
    return {}


def deviations(update: Update) -> dict[str, float]:
    """Deviation from orthogonality of each AO matrix of an update; empty without them."""
    if not isinstance(update, AoftLowRank | AoftPrompts):
        return {}
    d, strict = update.options.rank, update.options.strict
    return {kind: deviation(q, d, strict=strict) for kind, q in _ao_vectors(update).items()}


def orthogonality(tuned: TunedModel) -> dict[str, float]:
    """Mean and largest deviation of a model's AO matrices, for the metrics of an epoch.

    Returns:
        ``deviation_KIND_mean`` and ``deviation_KIND_max`` over all sites, where KIND is ``down``
        and ``up``, or ``prompts``; empty for a method without AO matrices.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for update in tuned.updates.values():
        for kind, value in deviations(update).items():
            found[kind].append(value)
    figures = {}
    for kind, values in found.items():
        figures[f"deviation_{kind}_mean"] = math.fsum(values) / len(values)
        figures[f"deviation_{kind}_max"] = max(values)
    return figures


def _ao_vectors(update: Update) -> dict[str, Tensor]:
    """Generating vectors of an update's AO matrices, by the kind of matrix; empty without them."""
    if isinstance(update, AoftLowRank):
        up = update.q_down if update.options.shared else update.q_up
        return {"down": update.q_down.detach().cpu(), "up": up.detach().cpu()}
    if isinstance(update, AoftPrompts):
        return {"prompts": update.q.detach().cpu()}
    return {}
