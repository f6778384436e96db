"""A timm model with a method's updates in it: ``attach`` creates it, ``merge`` folds it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from aoft_deploy.errors import CheckpointError
from aoft_deploy.tuning.backbones.identity import Backbone
from aoft_deploy.tuning.copying import copy_structure
from aoft_deploy.tuning.exact_folding import fold_exactly
from aoft_deploy.tuning.sites.classifier import classifier_names
from aoft_deploy.tuning.updates.applying import apply_linear
from aoft_deploy.tuning.updates.delta import Delta, OutputDelta, Rows, WeightDelta
from aoft_deploy.tuning.updates.folding import fold_rows
from aoft_deploy.tuning.updates.update import Update

__all__ = ["TunedModel", "UpdatedModule", "UpdatedVector"]


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


class TunedModel(nn.Module):
    """A frozen backbone with trained updates and a trained classifier, created by ``attach``.

    Attributes:
        backbone: The timm model, with updates at its sites.
        method: Name of the method.
        settings: Settings of the method, including defaults.
        identity: Identity of the backbone before training.
        classifier: Names of the classifier's parameters in the backbone.
        direct: Names of the backbone's own parameters that are trained: the classifier's, or all.
        updates: The update of every site, by the site's name.
    """

    def __init__(
        self,
        backbone: nn.Module,
        method: str,
        settings: dict[str, Any],
        updates: dict[str, Update],
        identity: Backbone,
        everything: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.method = method
        self.settings = settings
        self.identity = identity
        self.updates = updates
        self.classifier = classifier_names(backbone)
        names = [name for name, _ in backbone.named_parameters()]
        self.direct = names if everything else self.classifier

    def forward(self, x: Tensor) -> Tensor:
        """Logits. x: (batch, 3, H, W) → (batch, classes)."""
        logits: Tensor = self.backbone(x)
        return logits

    def train(self, mode: bool = True) -> Self:
        """Set the training mode, but keep the backbone's BatchNorm statistics."""
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters, by their names in a checkpoint.

        Names are ``update.SITE.PARAMETER`` and ``head.NAME``, and ``backbone.NAME`` in full
        fine-tuning.
        """
        named = {
            f"update.{site}.{name}": parameter
            for site, update in self.updates.items()
            for name, parameter in update.named_parameters()
        }
        for name in self.direct:
            kind = "head" if name in self.classifier else "backbone"
            named[f"{kind}.{name}"] = self.backbone.get_parameter(name)
        return named

    def load_trained(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors into the trained parameters.

        Args:
            tensors: Tensors with exactly the names and shapes of ``trained()``.

        Raises:
            CheckpointError: A name is missing or unknown, a shape differs, a value is not finite.
        """
        parameters = self.trained()
        _check_tensors(tensors, {name: p.shape for name, p in parameters.items()})
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return len(self.backbone.get_parameter(self.classifier[-1]))


def _check_tensors(tensors: Mapping[str, Tensor], shapes: dict[str, torch.Size]) -> None:
    for name, shape in shapes.items():
        if name not in tensors:
            raise CheckpointError(f"The checkpoint lacks {name}.")
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{name} has shape {tuple(tensors[name].shape)} in the checkpoint, "
                f"but the model needs {tuple(shape)}."
            )
        if not tensors[name].isfinite().all():
            raise CheckpointError(f"{name} holds values that are not finite.")
    unknown = sorted(set(tensors) - set(shapes))
    if unknown:
        raise CheckpointError(
            f"The checkpoint holds {unknown[0]}, which the model has no place for."
        )
