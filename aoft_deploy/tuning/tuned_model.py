"""A backbone with a method's updates in it, and the way back to a plain model.

``attach`` puts updates into a timm model and freezes the rest; ``merge`` returns a new plain model
with the updates folded into its weights and nothing else changed: the same modules, the same
state-dict keys, no extra operation.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from aoft_deploy.errors import AttachError, CheckpointError
from aoft_deploy.tuning.backbones.backbone import Backbone, identify
from aoft_deploy.tuning.methods import Build, get_method
from aoft_deploy.tuning.prompted_blocks import FixedPrompts, Prompted, place_prompts
from aoft_deploy.tuning.sites.discovery import Site, classifier_names, find_sites
from aoft_deploy.tuning.updates.delta import (
    Delta,
    OutputDelta,
    Rows,
    WeightDelta,
    apply_linear,
    fold_rows,
)
from aoft_deploy.tuning.updates.update import Update

__all__ = ["TunedModel", "attach", "merge"]


class UpdatedModule(nn.Module):
    """A frozen layer with updates on some of its output rows.

    Calling it applies the updates. Its ``weight`` and ``bias`` are the folded ones, so that a
    parent which reads them instead of calling the layer (beit, eva) gets the same answer.

    Args:
        base: The frozen layer; has a weight (out, …) and maybe a bias (out,).
        updates: Row ranges, disjoint and ascending, and the update of each.
        absorber: Path of the norm before a layer without bias, whose bias takes the shift when
            the updates are folded.
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
        """Weight and bias with the updates in them, differentiable."""
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
        """The layer's output for x with the updates applied."""
        deltas = self.deltas()
        if isinstance(self.base, nn.Linear):
            linear = [(rows, delta) for rows, delta in deltas if isinstance(delta, WeightDelta)]
            if len(linear) == len(deltas) and torch.is_grad_enabled():
                return apply_linear(x, self._base_weight, self._base_bias, linear)
            if len(deltas) == 1 and not linear:
                return deltas[0][1].mix(x, self.base(x), self._base_weight)
        weight, bias = fold_rows(self._base_weight, self._base_bias, deltas)
        tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        result: Tensor = functional_call(self.base, tensors, (x,))
        return result

    def plain(
        self, deltas: Mapping[Update, Any], in_place: bool
    ) -> tuple[nn.Module, Tensor | None]:
        """A copy of the base layer with the updates' float64 deltas folded in exactly.

        Beside it comes the folded bias of a layer that has none, for the absorber.
        """
        placed = [(r, deltas[u]) for r, u in zip(self.rows, self.updates, strict=True)]  # type: ignore[index]
        weight, bias = fold_exactly(self._base_weight, self._base_bias, placed, in_place)
        memo: dict[int, Any] = {id(self._base_weight): nn.Parameter(weight, requires_grad=False)}
        if bias is not None and not self.absorber:
            memo[id(self._base_bias)] = nn.Parameter(bias, requires_grad=False)
        return _twin(self.base, memo), bias if self.absorber else None


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
        delta = self.update.delta()
        assert isinstance(delta, OutputDelta)
        delta.fold_(torch.empty_like(folded), folded)
        return folded


class TunedModel(nn.Module):
    """A frozen backbone with trained updates and a trained classifier. Made by ``attach``.

    Attributes:
        backbone: The timm model, with updates at its sites.
        method: Name of the method.
        settings: Its settings, defaults filled in.
        identity: Name and hash of the backbone's weights before training.
        classifier: Names of the classifier's parameters in the backbone.
        direct: Names of all parameters of the backbone that are trained as they are.
        updates: The update of every site by the site's name.
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
        every = [name for name, _ in backbone.named_parameters()]
        self.direct = every if everything else self.classifier

    def forward(self, x: Tensor) -> Tensor:
        """Logits. x: (batch, 3, H, W) → (batch, classes)."""
        logits: Tensor = self.backbone(x)
        return logits

    def train(self, mode: bool = True) -> Self:
        """Switch to training, but leave BatchNorm's statistics as the backbone's."""
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name in the checkpoint.

        ``update.SITE.PARAMETER``, ``head.NAME``; ``backbone.NAME`` in full fine-tuning.
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
        return len(self.backbone.get_parameter(self.classifier[-1]))


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
    placed: list[tuple[Site, Update]] = []
    if chosen.build is not None:
        sites = find_sites(model)
        values = chosen.resolved(values, sites)
        placed = _build(chosen.build, sites, values, torch.Generator().manual_seed(seed))
        if not placed:
            known = ", ".join(sorted({site.role for site in sites} - {"other"}))
            other = ["block"] if "deep" in values else ["bias"]
            wanted = " or ".join(values.get("targets", other))
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


def merge(tuned: TunedModel, *, in_place: bool = False) -> nn.Module:
    """A plain model with the updates folded into its weights.

    Sums are formed in float64 and rounded once. The tuned model stays as it is. Frozen weights that
    no update touches are shared with it, not copied, so that many merged tasks of one backbone cost
    little memory; ``copy.deepcopy`` the result to change it in place.

    Args:
        tuned: A model from ``attach`` or ``load``.
        in_place: Write into the tuned model's own weights, which takes no new memory and half the
            time. The tuned model cannot be used afterwards, not even after an error.

    Returns:
        A new model of the backbone's own modules, in evaluation mode.

    Raises:
        CheckpointError: A folded weight is not finite, a shift has no place to go, or the model was
            merged in place before.
    """
    backbone, deltas = tuned.backbone, exact_deltas(tuned.updates.values())
    if isinstance(backbone, _Spent):
        raise CheckpointError(_Spent.MESSAGE)
    if in_place:
        tuned.backbone = _Spent()
    folded: dict[str, nn.Module] = {}
    shifts: list[tuple[str, str, Tensor]] = []
    for path, module in backbone.named_modules():
        if isinstance(module, UpdatedModule):
            folded[path], shift = module.plain(deltas, in_place)
            if shift is not None:
                shifts.append((module.absorber, path, shift))
        elif isinstance(module, Prompted) and "prompts" in module._modules:
            prompts = module.get_submodule("prompts")
            exact: Tensor = deltas[prompts].tokens  # type: ignore[index]
            tokens = exact.to(next(prompts.parameters()).dtype)
            _store(exact, tokens, tokens)
            folded[f"{path}.prompts"] = FixedPrompts(tokens)
    merged = _unwrapped(backbone, folded) if in_place else _copied(tuned, folded)
    for module in list(merged.modules()):
        if parametrize.is_parametrized(module):
            _fold_vectors(module)
    for absorber, path, shift in shifts:
        _absorb(merged.get_submodule(absorber), merged.get_submodule(path), shift)
    return merged.requires_grad_(False).eval()


def _copied(tuned: TunedModel, folded: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of the backbone with folded modules in it, sharing all frozen parameters."""
    trained = {id(tuned.backbone.get_parameter(name)) for name in tuned.direct}
    twins: dict[int, Any] = {id(p): p for p in tuned.backbone.parameters() if id(p) not in trained}
    twins |= {id(tuned.backbone.get_submodule(path)): module for path, module in folded.items()}
    return _twin(tuned.backbone, twins)


def _unwrapped(backbone: nn.Module, folded: Mapping[str, nn.Module]) -> nn.Module:
    """The backbone itself with folded modules in it."""
    for path, module in folded.items():
        backbone.set_submodule(path, module)
    return backbone


class _Spent(nn.Module):
    """What is left of a tuned model whose weights were given to a merged one."""

    MESSAGE = "This tuned model was merged in place and is gone: load its checkpoint again."

    def forward(self, x: Tensor) -> Tensor:
        raise CheckpointError(self.MESSAGE)

    def get_parameter(self, target: str) -> nn.Parameter:
        raise CheckpointError(self.MESSAGE)


ABSORBED = 1e-3
"""Largest error of a shift that a norm takes, relative to it and to what the norm's bias gives."""


@torch.no_grad()
def _absorb(norm: nn.Module, layer: nn.Module, shift: Tensor) -> None:
    """Give the norm before a wide linear layer without bias the layer's shift s.

    W (n + δ) = W n + s for the shortest δ with W δ = s, which exists since W has more columns than
    rows: from Wᵀ = Q R it is Q R⁻ᵀ s, whose error grows with W's condition, not with its square.
    Rounded to the bias's type, δ must still give s.
    """
    if not shift.any():
        return
    weight, bias = layer.get_parameter("weight").double(), norm.get_parameter("bias")
    wide, old = shift.double(), bias.double()
    q, r = torch.linalg.qr(weight.mT)
    change = q @ torch.linalg.solve_triangular(r.mT, wide[:, None], upper=False)[:, 0]
    new_bias = torch.empty_like(bias)
    if change.isfinite().all():
        _store(old + change, new_bias, bias)
    given = weight @ (new_bias.double() - old)
    bound = max(ABSORBED, 4 * torch.finfo(bias.dtype).eps)
    bound *= float(wide.abs().max() + (weight.abs() @ old.abs()).max())
    if not change.isfinite().all() or (given - wide).abs().max() > bound:
        raise CheckpointError(
            "Folding fails: a patch merging's weight is singular or nearly so, so the norm before "
            "it cannot take its shift."
        )
    _set(norm, "bias", new_bias)


_ATOMS = (bool, int, float, str, type(None))


def _twin(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """``copy.deepcopy(module, memo)`` in a fifth of its time, which is spent on empty dicts."""
    if id(module) in memo:
        known: nn.Module = memo[id(module)]
        return known
    if hasattr(module, "__deepcopy__"):
        own: nn.Module = copy.deepcopy(module, memo)
        return own
    twin = memo[id(module)] = object.__new__(type(module))
    for name, value in vars(module).items():
        if name == "_modules":
            twin.__dict__[name] = {n: c and _twin(c, memo) for n, c in value.items()}
        elif isinstance(value, _ATOMS):
            twin.__dict__[name] = value
        elif isinstance(value, (dict, set)) and not value:
            twin.__dict__[name] = type(value)()
        else:
            twin.__dict__[name] = copy.deepcopy(value, memo)
    return twin


FOLDED_AT_ONCE = 2**18
"""Weights folded at a time, through one float64 buffer that stays in cache."""


@torch.no_grad()
def exact_deltas(updates: Iterable[Update]) -> dict[Update, Any]:
    """The float64 delta of every update; those that are alike share one call of their formula."""
    alike: dict[Any, list[Update]] = defaultdict(list)
    for update in updates:
        alike[update.kind()].append(update)
    deltas: dict[Update, Any] = {}
    for group in alike.values():
        stacked = {
            name: torch.stack([u.get_parameter(name) for u in group]).double()
            for name, _ in group[0].named_parameters()
        }
        delta = group[0].formula(**stacked)
        deltas |= {update: delta[i] for i, update in enumerate(group)}
    return deltas


@torch.no_grad()
def fold_exactly(
    weight: Tensor,
    bias: Tensor | None,
    deltas: Iterable[tuple[Rows, Delta]],
    in_place: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Fold in float64 and round once to the weight's own type.

    Args:
        weight: (out, …).
        bias: (out,) or None.
        deltas: Disjoint, ascending row ranges and the float64 delta of each.
        in_place: Write into ``weight`` itself.

    Returns:
        New weight and bias; entries that the updates do not change keep their bits.

    Raises:
        CheckpointError: A folded value is not finite.
    """
    new_weight = weight if in_place else _new_memory(weight)
    new_bias = None if bias is None else bias.clone()
    deltas = list(deltas)
    step = max(1, FOLDED_AT_ONCE * len(weight) // weight.numel())
    if weight.dim() > 2 or any(delta.mixes_rows for _, delta in deltas):
        step = len(weight)
    buffer = torch.empty((step, *weight.shape[1:]), dtype=torch.float64, device=weight.device)
    done = 0
    for (start, stop), delta in deltas:
        if not in_place:
            new_weight[done:start] = weight[done:start]
        for first in range(start, stop, step):
            block = slice(first, min(first + step, stop))
            wide = buffer[: block.stop - first].copy_(weight[block])
            wide_bias = None if bias is None else bias[block].to(torch.float64, copy=True)
            delta.fold_(wide, wide_bias, first - start)
            _store(wide, new_weight[block], weight[block])
            if bias is not None and wide_bias is not None and new_bias is not None:
                _store(wide_bias, new_bias[block], bias[block])
        done = stop
    if not in_place:
        new_weight[done:] = weight[done:]
    return new_weight, new_bias


def _new_memory(like: Tensor) -> Tensor:
    """An uninitialised tensor; NumPy asks Linux for huge pages, which come twice as fast."""
    if like.device.type != "cpu":
        return torch.empty_like(like)
    data = torch.from_numpy(np.empty(like.numel() * like.element_size(), np.uint8))
    return data.view(like.dtype).view(like.shape)


def _store(wide: Tensor, new: Tensor, old: Tensor) -> None:
    """Round ``wide`` into ``new``; where that equals ``old``, zeros keep their sign."""
    if _has_negative_zero(old):
        wide = wide.copysign(torch.where(wide == old, old, wide))
    new.copy_(wide)
    if not new.sum().isfinite() and not new.isfinite().all():
        raise CheckpointError(
            f"Folding gives values that are not finite in {old.dtype}: the checkpoint's numbers "
            "are too large or damaged."
        )


def _has_negative_zero(tensor: Tensor) -> bool:
    """Whether −0.0 occurs: as an integer of the same width its bits are the smallest of all."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return bool(tensor.view(kind).amin() == torch.iinfo(kind).min)


def _place(model: nn.Module, placed: list[tuple[Site, Update]]) -> None:
    """Wrap the layers that own the sites."""
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
            vector = _UpdatedVector(update, order)
            parametrize.register_parametrization(owner, site.tensor, vector)
    for path, pairs in layers.items():
        base = model.get_submodule(path)
        whole = (0, len(base.weight))  # type: ignore[arg-type]
        updates = [(site.rows if site.part else whole, update) for site, update in pairs]
        model.set_submodule(path, UpdatedModule(base, updates, pairs[0][0].absorber), strict=True)
    place_prompts(model, prompted)


def _fold_vectors(module: nn.Module) -> None:
    """Replace a module's parametrised vectors by folded plain parameters, in their old order.

    ``remove_parametrizations`` would change the class, which the tuned model's module shares.
    """
    parametrizations = module.parametrizations
    assert isinstance(parametrizations, nn.ModuleDict)
    entries: dict[str, Any] = dict(parametrizations.items())
    del module._modules["parametrizations"]
    module.__class__ = type(module).__bases__[0]
    for name, entry in entries.items():
        original = entry.original.detach()
        deltas = exact_deltas([entry[0].update])
        rows = (0, len(original))
        folded = fold_exactly(original, original, [(rows, d) for d in deltas.values()])[1]
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
