"""Wrappers of frozen layers and vectors that apply updates in the forward, and fold them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from aoft_deploy.tuning.copying import copy_structure
from aoft_deploy.tuning.exact_folding import fold_exactly
from aoft_deploy.tuning.updates.applying import apply_linear
from aoft_deploy.tuning.updates.delta import Delta, OutputDelta, Rows, WeightDelta
from aoft_deploy.tuning.updates.folding import fold_rows
from aoft_deploy.tuning.updates.update import Update

__all__ = ["UpdatedModule", "UpdatedVector"]


class UpdatedModule(nn.Module):
    """A frozen layer with updates on some of its output rows.

    Calling it applies the updates. Its ``weight`` and ``bias`` are the folded ones, so a parent
    that reads them instead of calling the layer (beit, eva) computes the same output.

    Args:
        base: The frozen layer, with a weight (out, …) and optionally a bias (out,).
        updates: Disjoint, ascending row ranges, and the update of each.
        absorber: Path of the preceding norm, whose bias absorbs the shift in a merge if this layer
            has no bias.
    """

    def __init__(
        self, base: nn.Module, updates: Iterable[tuple[Rows, Update]], absorber: str = ""
    ) -> None:
        super().__init__()
        pairs = list(updates)
        self.base, self.absorber = base, absorber
        self.rows = [rows for rows, _ in pairs]
        self.updates = nn.ModuleList(update for _, update in pairs)

    def deltas(self) -> list[tuple[Rows, Delta]]:
        """Row ranges and the deltas of their updates."""
        return [(r, u.delta()) for r, u in zip(self.rows, self.updates, strict=True)]  # type: ignore[operator]

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with the updates folded in, differentiable."""
        return fold_rows(self._base_weight, self._base_bias, self.deltas())

    @property
    def _base_weight(self) -> Tensor:
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def _base_bias(self) -> Tensor | None:
        bias = self.base._parameters.get("bias")
        return self._base_weight.new_zeros(len(self._base_weight)) if self.absorber else bias

    @property
    def weight(self) -> Tensor:
        """The folded weight."""
        return self.folded()[0]

    @property
    def bias(self) -> Tensor | None:
        """The folded bias."""
        return self.folded()[1]

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output for x, with the updates applied."""
        deltas = self.deltas()
        if isinstance(self.base, nn.Linear):
            on_weight = [(rows, delta) for rows, delta in deltas if isinstance(delta, WeightDelta)]
            if len(on_weight) == len(deltas) and torch.is_grad_enabled():
                return apply_linear(x, self._base_weight, self._base_bias, on_weight)
            if len(deltas) == 1 and not on_weight:
                return deltas[0][1].mix(x, self.base(x), self._base_weight)
        weight, bias = fold_rows(self._base_weight, self._base_bias, deltas)
        tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        result: Tensor = functional_call(self.base, tensors, (x,))
        return result

    def merged(
        self, deltas: Mapping[Update, Any], in_place: bool
    ) -> tuple[nn.Module, Tensor | None]:
        """A plain copy of the base layer with deltas folded in.

        Args:
            deltas: The float64 delta of every update.
            in_place: Write into the base layer's own weight.

        Returns:
            The layer, and the shift that the absorber takes, or None without an absorber.
        """
        placed = [(r, deltas[u]) for r, u in zip(self.rows, self.updates, strict=True)]  # type: ignore[index]
        weight, bias = fold_exactly(self._base_weight, self._base_bias, placed, in_place)
        memo: dict[int, Any] = {id(self._base_weight): nn.Parameter(weight, requires_grad=False)}
        if bias is not None and not self.absorber:
            memo[id(self._base_bias)] = nn.Parameter(bias, requires_grad=False)
        return copy_structure(self.base, memo), bias if self.absorber else None


class UpdatedVector(nn.Module):
    """Parametrization of a frozen vector by an update, for biases outside their linear layer.

    Args:
        update: The update that shifts the vector.
        order: Names of the owner's parameters in their original order, which a merge restores.
    """

    def __init__(self, update: Update, order: tuple[str, ...]) -> None:
        super().__init__()
        self.update = update
        self.order = order

    def forward(self, original: Tensor) -> Tensor:
        """The vector with the update folded in, of the same shape."""
        folded = original.clone()
        delta = self.update.delta()
        assert isinstance(delta, OutputDelta)
        delta.fold_(torch.empty_like(folded), folded)
        return folded
