"""A backbone with a method's updates in it, and the way back to a plain model.

``attach`` puts updates into a timm model and freezes the rest; ``merge`` returns a new plain model
with the updates folded into its weights and nothing else changed: the same modules, the same
state-dict keys, no extra operation.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from aoft_deploy.backbone import Backbone, identify
from aoft_deploy.delta import Delta, Rows, WeightDelta, apply_linear, fold_rows
from aoft_deploy.errors import AttachError, CheckpointError
from aoft_deploy.methods import get_method
from aoft_deploy.sites import Site, classifier_names, find_sites
from aoft_deploy.updates import Update

__all__ = ["TunedModel", "attach", "merge"]


class UpdatedModule(nn.Module):
    """A frozen layer with updates on some of its output rows.

    Calling it applies the updates. Its ``weight`` and ``bias`` are the folded ones, so that a
    parent which reads them instead of calling the layer (beit, eva) gets the same answer.

    Args:
        base: The frozen layer; has a weight (out, …) and maybe a bias (out,).
        updates: Row ranges, disjoint and ascending, and the update of each.
    """

    def __init__(self, base: nn.Module, updates: Iterable[tuple[Rows, Update]]) -> None:
        super().__init__()
        pairs = list(updates)
        self.base = base
        self.rows = [rows for rows, _ in pairs]
        self.updates = nn.ModuleList(update for _, update in pairs)

    def deltas(self) -> list[tuple[Rows, Delta]]:
        """Row ranges and the deltas of their updates."""
        return [(r, u.delta()) for r, u in zip(self.rows, self.updates, strict=True)]  # type: ignore[operator]

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with the updates in them, differentiable."""
        return fold_rows(self._base_weight, self._base_bias, self.deltas())

    @property
    def _base_weight(self) -> Tensor:
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def _base_bias(self) -> Tensor | None:
        return self.base._parameters.get("bias")

    @property
    def weight(self) -> Tensor:
        """The folded weight."""
        return self.folded()[0]

    @property
    def bias(self) -> Tensor | None:
        """The folded bias."""
        return self.folded()[1]

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output for x with the updates applied."""
        deltas = self.deltas()
        linear = [(rows, delta) for rows, delta in deltas if isinstance(delta, WeightDelta)]
        if type(self.base) is nn.Linear and len(linear) == len(deltas):
            return apply_linear(x, self._base_weight, self._base_bias, linear)
        weight, bias = fold_rows(self._base_weight, self._base_bias, deltas)
        tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        result: Tensor = functional_call(self.base, tensors, (x,))
        return result

    def plain(self) -> nn.Module:
        """A copy of the base layer with the updates folded in exactly."""
        old = {"weight": self._base_weight, "bias": self._base_bias}
        new = fold_exactly(self._base_weight, self._base_bias, self.rows, self.updates)  # type: ignore[arg-type]
        pairs = zip(old.values(), new, strict=True)
        memo = {id(o): nn.Parameter(n, requires_grad=False) for o, n in pairs if n is not None}
        return copy.deepcopy(self.base, memo)


class _UpdatedVector(nn.Module):
    """Parametrisation of a frozen vector by an update, for biases outside their linear layer.

    Args:
        update: What shifts the vector.
        order: Names of the owner's parameters as they stood, which a merge restores.
    """

    def __init__(self, update: Update, order: tuple[str, ...]) -> None:
        super().__init__()
        self.update = update
        self.order = order

    def forward(self, original: Tensor) -> Tensor:
        folded = original.clone()
        delta: Delta = self.update.delta()
        delta.fold_(torch.empty_like(folded), folded)
        return folded


class TunedModel(nn.Module):
    """A frozen backbone with trained updates and a trained classifier. Made by ``attach``.

    Attributes:
        backbone: The timm model, with updates at its sites.
        method: Name of the method.
        settings: Its settings, defaults filled in.
        identity: Name and hash of the backbone's frozen weights.
        classifier: Names of the classifier's parameters in the backbone.
    """

    def __init__(
        self,
        backbone: nn.Module,
        method: str,
        settings: dict[str, Any],
        updates: dict[str, Update],
        identity: Backbone,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.method = method
        self.settings = settings
        self.identity = identity
        self._updates = updates
        self.classifier = classifier_names(backbone)

    def forward(self, x: Tensor) -> Tensor:
        """Logits. x: (batch, 3, H, W) → (batch, classes)."""
        logits: Tensor = self.backbone(x)
        return logits

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by checkpoint name: ``update.SITE.PARAMETER``, ``head.NAME``."""
        named = {
            f"update.{site}.{name}": parameter
            for site, update in self._updates.items()
            for name, parameter in update.named_parameters()
        }
        head = {f"head.{n}": self.backbone.get_parameter(n) for n in self.classifier}
        return named | head

    def load_trained(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors into the trained parameters.

        Args:
            tensors: Exactly the names and shapes of ``trained()``.

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
        """Width of the logits."""
        return len(self.backbone.get_parameter(self.classifier[0]))


def attach(
    model: nn.Module,
    method: str = "aoft-lora-star",
    *,
    seed: int = 0,
    backbone: Backbone | None = None,
    **settings: Any,
) -> TunedModel:
    """Put a method's updates into a model and freeze everything else but the classifier.

    The model itself is changed; its weights are not.

    Args:
        model: A plain timm model with a classifier.
        method: One of ``method_names()``.
        seed: Seed of the updates' random starts.
        backbone: Identity of the model, from ``create_backbone``; None asks the model.
        settings: The method's settings, such as ``rank=16``.

    Returns:
        The model ready for training.

    Raises:
        UnknownNameError: Unknown method or setting.
        SettingError: A setting outside its range.
        AttachError: The model offers no site for the method, or has no classifier.
        BackboneError: The model does not know its timm name and ``backbone`` does not say it.
    """
    chosen = get_method(method)
    values = chosen.settings(settings)
    classifier = classifier_names(model)
    generator = torch.Generator().manual_seed(seed)
    placed: list[tuple[Site, Update]] = []
    if chosen.build is not None:
        for site in find_sites(model):
            update = chosen.build(site, values, generator)
            if update is not None:
                placed.append((site, update))
        if not placed:
            raise AttachError(
                f"{method} found none of its targets {values.get('targets', '')} "
                f"in {type(model).__name__}."
            )
    identity = backbone or identify(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in classifier)
    _place(model, placed)
    updates = {site.name: update for site, update in placed}
    return TunedModel(model, method, values, updates, identity)


def merge(tuned: TunedModel) -> nn.Module:
    """A plain model with the updates folded into its weights.

    Sums are formed in float64 and rounded once. The tuned model stays as it is. Frozen weights that
    no update touches are shared with it, not copied, so that many merged tasks of one backbone cost
    little memory; ``copy.deepcopy`` the result to change it in place.

    Args:
        tuned: A model from ``attach`` or ``load``.

    Returns:
        A new model of the backbone's own modules, in evaluation mode.

    Raises:
        CheckpointError: A folded weight is not finite.
    """
    trained = {id(tuned.backbone.get_parameter(name)) for name in tuned.classifier}
    twins: dict[int, Any] = {id(p): p for p in tuned.backbone.parameters() if id(p) not in trained}
    for module in tuned.backbone.modules():
        if isinstance(module, UpdatedModule):
            twins[id(module)] = module.plain()
    merged = copy.deepcopy(tuned.backbone, twins)
    for module in merged.modules():
        if parametrize.is_parametrized(module):
            _fold_vectors(module)
    return merged.requires_grad_(False).eval()


FOLDED_AT_ONCE = 2**18
"""Weights folded at a time, through one float64 buffer that stays in cache."""


@torch.no_grad()
def fold_exactly(
    weight: Tensor, bias: Tensor | None, rows: list[Rows], updates: Iterable[Update]
) -> tuple[Tensor, Tensor | None]:
    """Fold in float64 and round once to the weight's own type.

    Args:
        weight: (out, …).
        bias: (out,) or None.
        rows: Disjoint, ascending row ranges.
        updates: The update of each.

    Returns:
        New weight and bias; entries that the updates do not change keep their bits.

    Raises:
        CheckpointError: A folded value is not finite.
    """
    new_weight, new_bias = _new_memory(weight), None if bias is None else bias.clone()
    step = max(1, FOLDED_AT_ONCE * len(weight) // weight.numel())
    buffer = torch.empty((step, *weight.shape[1:]), dtype=torch.float64, device=weight.device)
    done = 0
    for (start, stop), update in zip(rows, updates, strict=True):
        new_weight[done:start] = weight[done:start]
        delta = update.formula(**{n: p.double() for n, p in update.named_parameters()})
        for first in range(start, stop, step):
            block = slice(first, min(first + step, stop))
            wide = buffer[: block.stop - first].copy_(weight[block])
            wide_bias = None if bias is None else bias[block].to(torch.float64, copy=True)
            delta.fold_(wide, wide_bias, first - start)
            new_weight[block] = wide
            if new_bias is not None and wide_bias is not None:
                new_bias[block] = wide_bias
        done = stop
    new_weight[done:] = weight[done:]
    return _checked(new_weight, weight), None if bias is None else _checked(new_bias, bias)


def _new_memory(like: Tensor) -> Tensor:
    """An uninitialised tensor; NumPy asks Linux for huge pages, which come twice as fast."""
    if like.device.type != "cpu":
        return torch.empty_like(like)
    data = torch.from_numpy(np.empty(like.numel() * like.element_size(), np.uint8))
    return data.view(like.dtype).view(like.shape)


def _checked(new: Tensor | None, old: Tensor) -> Tensor:
    """``new`` if it is finite; where it equals ``old``, its zeros keep their sign."""
    assert new is not None
    if not new.sum().isfinite() and not new.isfinite().all():
        raise CheckpointError(
            f"Folding gives values that are not finite in {old.dtype}: the checkpoint's numbers "
            "are too large or damaged."
        )
    return torch.where(new == old, old, new) if _has_negative_zero(old) else new


def _has_negative_zero(tensor: Tensor) -> bool:
    """Whether −0.0 occurs: as an integer of the same width its bits are the smallest of all."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return bool(tensor.view(kind).amin() == torch.iinfo(kind).min)


def _place(model: nn.Module, placed: list[tuple[Site, Update]]) -> None:
    """Wrap the layers that own the sites."""
    layers: dict[str, list[tuple[Rows, Update]]] = defaultdict(list)
    orders: dict[str, tuple[str, ...]] = {}
    for site, update in placed:
        if site.tensor == "weight":
            layers[site.module].append((site.rows, update))
        else:
            owner = model.get_submodule(site.module)
            order = orders.setdefault(site.module, tuple(owner._parameters))
            vector = _UpdatedVector(update, order)
            parametrize.register_parametrization(owner, site.tensor, vector)
    for path, updates in layers.items():
        layer = UpdatedModule(model.get_submodule(path), updates)
        model.set_submodule(path, layer, strict=True)


def _fold_vectors(module: nn.Module) -> None:
    """Replace a module's parametrised vectors by folded plain parameters, in their old order."""
    parametrizations = module.parametrizations
    assert isinstance(parametrizations, nn.ModuleDict)
    entries: dict[str, Any] = dict(parametrizations.items())
    for name, entry in entries.items():
        original = entry.original.detach()
        folded = fold_exactly(original, original, [(0, len(original))], [entry[0].update])[1]
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        assert folded is not None
        _set(module, name, folded)
    order = next(iter(entries.values()))[0].order
    module._parameters = {name: module._parameters[name] for name in order}


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    module.register_parameter(name, nn.Parameter(value, requires_grad=False))


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
