"""Where each task's parameters lie in the tables of a multi-task model."""

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
    """Sites whose updates are alike: one call of the formula serves them all.

    Attributes:
        update: Any of their updates; only its constants are used.
        sites: Their names.
        fields: Name, first number and shape of each parameter, of one site.
    """

    update: Update
    sites: tuple[str, ...]
    fields: tuple[tuple[str, int, tuple[int, ...]], ...]


class Layout:
    """Where the numbers of a task's updates stand in its row.

    Attributes:
        numbers: Length of a row.
        groups: Alike sites.

    Args:
        updates: The update of every site by the site's name.
    """

    def __init__(self, updates: Mapping[str, Update]) -> None:
        alike: dict[Any, list[str]] = defaultdict(list)
        for site, update in updates.items():
            alike[update.kind()].append(site)
        self.numbers, self.groups = 0, list[Group]()
        for sites in alike.values():
            fields = []
            for name, parameter in updates[sites[0]].named_parameters():
                fields.append((name, self.numbers, tuple(parameter.shape)))
                self.numbers += len(sites) * parameter.numel()
            self.groups.append(Group(updates[sites[0]], tuple(sites), tuple(fields)))

    def order(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names, as ``TunedModel.trained`` has them, and shapes of a row's tensors."""
        return [
            (f"update.{site}.{name}", shape)
            for group in self.groups
            for name, _, shape in group.fields
            for site in group.sites
        ]

    def row(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """A task's numbers in order.

        Args:
            tensors: As ``TunedModel.trained`` names them; others are ignored.

        Returns:
            (numbers,), float32.

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
            rows: (batch, numbers).

        Returns:
            Deltas by site, their fields with the leading axis ``batch``.
        """
        found: dict[str, Any] = {}
        for group in self.groups:
            count = len(group.sites)
            values = {}
            for name, start, shape in group.fields:
                numbers = rows[:, start : start + count * math.prod(shape)]
                values[name] = numbers.reshape(rows.shape[0], count, *shape)
            delta = group.update.formula(**values)
            found |= {site: delta[:, i] for i, site in enumerate(group.sites)}
        return found


def classifier_rows(tuned: TunedModel) -> Tensor:
    """A task's classifier as rows of weight and bias, (classes, width + 1), float32."""
    weight, *rest = (tuned.backbone.get_parameter(name).detach() for name in tuned.classifier)
    bias = rest[0] if rest else weight.new_zeros(len(weight))
    return torch.cat([weight, bias[:, None]], dim=1).float()
