"""Merge: fold the trained updates into a new plain model and leave the tuned one as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from aoft_deploy.errors import CheckpointError
from aoft_deploy.tuning.copying import copy_structure
from aoft_deploy.tuning.exact_folding import exact_deltas, fold_exactly, store
from aoft_deploy.tuning.prompted_blocks import FixedPrompts, Prompted
from aoft_deploy.tuning.tuned_model import TunedModel, UpdatedModule

__all__ = ["merge"]


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
            store(exact, tokens, tokens)
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
    return copy_structure(tuned.backbone, twins)


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
        store(old + change, new_bias, bias)
    given = weight @ (new_bias.double() - old)
    bound = max(ABSORBED, 4 * torch.finfo(bias.dtype).eps)
    bound *= float(wide.abs().max() + (weight.abs() @ old.abs()).max())
    if not change.isfinite().all() or (given - wide).abs().max() > bound:
        raise CheckpointError(
            "Folding fails: a patch merging's weight is singular or nearly so, so the norm before "
            "it cannot take its shift."
        )
    _set(norm, "bias", new_bias)


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
