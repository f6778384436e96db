"""Merge: fold the trained updates into a new plain model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from aoft_deploy.errors import CheckpointError
from aoft_deploy.tuning.copying import copy_structure
from aoft_deploy.tuning.exact_folding import exact_deltas, fold_exactly, round_into
from aoft_deploy.tuning.prompted_blocks import FixedPrompts, Prompted
from aoft_deploy.tuning.tuned_model import TunedModel
from aoft_deploy.tuning.updated_layers import UpdatedModule

__all__ = ["merge"]

ABSORPTION_ERROR = 1e-3
"""Allowed error of an absorbed shift, relative to it and to the effect of the norm's bias."""


def merge(tuned: TunedModel, *, in_place: bool = False) -> nn.Module:
    """A plain model with the updates folded into its weights.

    The result has the backbone's module types, state-dict keys and operations. Prompts are the
    exception: they stay beside their blocks, as constants. Sums are computed in float64 and rounded
    once. The tuned model is not changed. Both models share the weights without updates, so many
    merged tasks of one backbone need little memory; ``copy.deepcopy`` the result before changing
    it.

    Args:
        tuned: A model from ``attach`` or ``load``.
        in_place: Write into the tuned model's own weights, which needs no new memory and half the
            time. The tuned model cannot be used afterwards, not even after an error.

    Returns:
        A new model in evaluation mode.

    Raises:
        CheckpointError: A folded weight is not finite, a norm cannot absorb a shift, or the model
            was merged in place before.
    """
    backbone, deltas = tuned.backbone, exact_deltas(tuned.updates.values())
    if isinstance(backbone, _MergedInPlace):
        raise CheckpointError(_MergedInPlace.MESSAGE)
    if in_place:
        tuned.backbone = _MergedInPlace()
    folded: dict[str, nn.Module] = {}
    shifts: list[tuple[str, str, Tensor]] = []
    for path, module in backbone.named_modules():
        if isinstance(module, UpdatedModule):
            folded[path], shift = module.merged(deltas, in_place)
            if shift is not None:
                shifts.append((module.absorber, path, shift))
        elif isinstance(module, Prompted) and "prompts" in module._modules:
            prompts = module.get_submodule("prompts")
            exact: Tensor = deltas[prompts].tokens  # type: ignore[index]
            tokens = exact.to(next(prompts.parameters()).dtype)
            round_into(exact, tokens, tokens)
            folded[f"{path}.prompts"] = FixedPrompts(tokens)
    merged = _with_modules(backbone, folded) if in_place else _copy(tuned, folded)
    for module in list(merged.modules()):
        if parametrize.is_parametrized(module):
            _fold_vectors(module)
    for absorber, path, shift in shifts:
        _absorb(merged.get_submodule(absorber), merged.get_submodule(path), shift)
    return merged.requires_grad_(False).eval()


def _copy(tuned: TunedModel, folded: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of the backbone that contains folded modules and shares all frozen parameters."""
    trained = {id(tuned.backbone.get_parameter(name)) for name in tuned.direct}
    memo: dict[int, Any] = {id(p): p for p in tuned.backbone.parameters() if id(p) not in trained}
    memo |= {id(tuned.backbone.get_submodule(path)): module for path, module in folded.items()}
    return copy_structure(tuned.backbone, memo)


def _with_modules(backbone: nn.Module, folded: Mapping[str, nn.Module]) -> nn.Module:
    """The backbone itself, with folded modules in place of wrapped ones."""
    for path, module in folded.items():
        backbone.set_submodule(path, module)
    return backbone


@torch.no_grad()
def _absorb(norm: nn.Module, layer: nn.Module, shift: Tensor) -> None:
    """Add a linear layer's shift s to the bias of the preceding norm. The layer has no bias.

    For the norm's output n, W (n + δ) = W n + s if W δ = s. W has more columns than rows, so there
    is a shortest δ = Q R⁻ᵀ s with Wᵀ = Q R. Its error grows with the condition of W, not with its
    square. After rounding to the bias's dtype, δ must still give s.
    """
    if not shift.any():
        return
    weight, bias = layer.get_parameter("weight").double(), norm.get_parameter("bias")
    exact_shift, old = shift.double(), bias.double()
    q, r = torch.linalg.qr(weight.mT)
    change = q @ torch.linalg.solve_triangular(r.mT, exact_shift[:, None], upper=False)[:, 0]
    new_bias = torch.empty_like(bias)
    if change.isfinite().all():
        round_into(old + change, new_bias, bias)
    absorbed = weight @ (new_bias.double() - old)
    bound = max(ABSORPTION_ERROR, 4 * torch.finfo(bias.dtype).eps)
    bound *= float(exact_shift.abs().max() + (weight.abs() @ old.abs()).max())
    if not change.isfinite().all() or (absorbed - exact_shift).abs().max() > bound:
        raise CheckpointError(
            "Folding fails: the weight of a patch merging is singular or nearly singular, so the "
            "norm before it cannot absorb its shift."
        )
    _set(norm, "bias", new_bias)


def _fold_vectors(module: nn.Module) -> None:
    """Replace a module's parametrized vectors with folded plain parameters, in the old order.

    ``remove_parametrizations`` would change the class that the tuned model's module also has.
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


class _MergedInPlace(nn.Module):
    """Replaces the backbone of a tuned model that was merged in place."""

    MESSAGE = "This tuned model was merged in place and cannot be used: load its checkpoint again."

    def forward(self, x: Tensor) -> Tensor:
        raise CheckpointError(self.MESSAGE)

    def get_parameter(self, target: str) -> nn.Parameter:
        raise CheckpointError(self.MESSAGE)
