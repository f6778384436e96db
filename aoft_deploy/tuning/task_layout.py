"""The order of a task's parameters in the tables of a multi-task model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aoft_deploy.errors import CheckpointError
from aoft_deploy.tuning.tuned_model import TunedModel
from aoft_deploy.tuning.updates.update import Update

__all__ = ["Layout", "classifier_rows"]


@dataclass(frozen=True)
class Group:
    """Sites whose updates are of equal kind, so one call of the formula serves all of them.

    Attributes:
        update: The update of one of the sites; only its constants are used.
        sites: Names of the sites.
        fields: Name, offset in a row and shape of each parameter of one site.
    """

    update: Update
    sites: tuple[str, ...]
    fields: tuple[tuple[str, int, tuple[int, ...]], ...]


class Layout:
    """The order in which a row contains the parameters of a task's updates.

    Attributes:
        row_length: Number of parameters in a row.
        groups: Sites with updates of equal kind.

    Args:
        updates: The update of every site, by the site's name.
    """

    def __init__(self, updates: Mapping[str, Update]) -> None:
        kinds: dict[Any, list[str]] = defaultdict(list)
        for site, update in updates.items():
            kinds[update.kind()].append(site)
        self.row_length, self.groups = 0, list[Group]()
        for sites in kinds.values():
            fields = []
            for name, parameter in updates[sites[0]].named_parameters():
                fields.append((name, self.row_length, tuple(parameter.shape)))
                self.row_length += len(sites) * parameter.numel()
            self.groups.append(Group(updates[sites[0]], tuple(sites), tuple(fields)))

    def order(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names, as in ``TunedModel.trained``, and shapes of a row's tensors."""
        return [
            (f"update.{site}.{name}", shape)
            for group in self.groups
            for name, _, shape in group.fields
            for site in group.sites
        ]

    def row(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """A task's parameters as one row.

        Args:
            tensors: Tensors by their names in ``TunedModel.trained``; others are ignored.

        Returns:
            (row_length,), float32.

        Raises:
            CheckpointError: A tensor is missing or has another shape.
        """
        parts = []
        for name, shape in self.order():
            tensor = tensors.get(name)
            if tensor is None or tuple(tensor.shape) != shape:
                raise CheckpointError(
                    f"The task's {name} must have shape {shape}: it was trained with another "
                    "method or other settings than the fleet's."
                )
            parts.append(tensor.detach().float().reshape(-1))
        return torch.cat(parts) if parts else torch.empty(0)

    def deltas(self, rows: Tensor) -> dict[str, Any]:
        """Every site's delta for the samples of a batch.

        Args:
            rows: (batch, row_length).

        Returns:
            Deltas by site. Their fields have a leading axis ``batch``.
        """
        deltas: dict[str, Any] = {}
        for group in self.groups:
            count = len(group.sites)
            values = {}
            for name, start, shape in group.fields:
                flat = rows[:, start : start + count * math.prod(shape)]
                values[name] = flat.reshape(rows.shape[0], count, *shape)
            delta = group.update.formula(**values)
            deltas |= {site: delta[:, i] for i, site in enumerate(group.sites)}
        return deltas


def classifier_rows(tuned: TunedModel) -> Tensor:
    """A task's classifier, one row of weight and bias per class: (classes, width + 1), float32."""
    weight, *rest = (tuned.backbone.get_parameter(name).detach() for name in tuned.classifier)
    bias = rest[0] if rest else weight.new_zeros(len(weight))
    return torch.cat([weight, bias[:, None]], dim=1).float()
