"""Low-rank updates of linear maps, written out as LoRA's two matrices.

The way to every program that knows LoRA and none of our methods.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aoft_deploy.errors import SettingError
from aoft_deploy.tuning.tuned_model import TunedModel, UpdatedModule
from aoft_deploy.tuning.updates.aoft import AoftLowRank
from aoft_deploy.tuning.updates.low_rank import LowRank
from aoft_deploy.tuning.updates.orthogonal import approximately_orthogonal
from aoft_deploy.tuning.updates.update import Update

__all__ = ["bounded", "bypassed_layers", "low_rank_factors"]

Factors = tuple[Tensor, Tensor]
"""A (r, in) and B (out, r) in float64, of ΔW = B A."""


@torch.no_grad()
def low_rank_factors(tuned: TunedModel) -> dict[str, Factors]:
    """Every layer's change as ΔW = B A.

    Sites that are parts of one layer stand beside each other: the rows of A one below the other,
    each part's columns of B filled in its own rows only.

    Args:
        tuned: A model with AOFT-LoRA or LoRA in it.

    Returns:
        A (r, in) and B (out, r) in float64 by the layer's path, r ≤ min(in, out).

    Raises:
        SettingError: The method does more, or nothing at all, to the weights of linear maps.
    """
    sites = {update: site for site, update in tuned.updates.items()}
    if not sites or tuned.direct != tuned.classifier:
        raise SettingError(
            f"{tuned.method} has no low-rank updates, so it cannot be written as LoRA: export "
            "with --to onnx."
        )
    for update, site in sites.items():
        if type(update) not in (LowRank, AoftLowRank):
            raise SettingError(
                f"{tuned.method} cannot be written as LoRA, because its {type(update).__name__} at "
                f"{site} is no low-rank change of a linear map: export with --to onnx."
            )
    layers = {
        path: layer
        for path, layer in tuned.backbone.named_modules()
        if isinstance(layer, UpdatedModule)
    }
    for path, layer in layers.items():
        if not isinstance(layer.base, nn.Linear):
            raise SettingError(
                f"{tuned.method} cannot be written as LoRA, because {path} is a "
                f"{type(layer.base).__name__}, where LoRA has another form: export with --to onnx."
            )
    return {path: _stacked(layer) for path, layer in layers.items()}


def _stacked(layer: UpdatedModule) -> Factors:
    out = len(layer.base.get_parameter("weight"))
    parts = [_factors(update) for update in layer.updates if isinstance(update, Update)]
    a = torch.cat([part for part, _ in parts])
    b = a.new_zeros(out, len(a))
    column = 0
    for (start, stop), (_, part) in zip(layer.rows, parts, strict=True):
        b[start:stop, column : column + part.shape[1]] = part
        column += part.shape[1]
    return bounded(a, b)


def _factors(update: Update) -> Factors:
    """A (r, in) and B (rows, r) of one update; AO's from its definition, entry by entry."""
    numbers = {name: p.detach().double() for name, p in update.named_parameters()}
    if isinstance(update, LowRank):
        return numbers["a"], numbers["b"] * update.scale
    assert isinstance(update, AoftLowRank)
    options, q_down = update.options, numbers["q_down"]
    pair = [q_down, numbers.get("q_up", q_down)]
    if options.strict:
        pair = [q / q.norm().clamp(min=1e-12) for q in pair]
    down, up = (approximately_orthogonal(q, options.rank) for q in pair)
    lam = numbers.get("rank_scale", down.new_ones(options.rank))
    return options.scale * lam[:, None] * down.mT, up


def bounded(a: Tensor, b: Tensor) -> Factors:
    """The same product with r ≤ min(in, out).

    Args:
        a: (r, in).
        b: (out, r).

    Returns:
        Both as they are, or the product and an identity where r is larger than a matrix allows.
    """
    if len(a) <= min(len(b), a.shape[1]):
        return a, b
    product = b @ a
    eye = torch.eye(min(product.shape), dtype=a.dtype)
    return (product, eye) if len(b) < a.shape[1] else (eye, product)


@torch.no_grad()
def bypassed_layers(tuned: TunedModel, size: int) -> list[str]:
    """Paths of changed layers whose weight the model reads without calling them.

    timm's beit, fused eva and swinv2 attentions do so with qkv; PEFT's LoRA, which acts in the
    call, then has no effect until it is merged.

    Args:
        tuned: A model with updates in it, in evaluation mode.
        size: Side of its square input in pixels.
    """
    layers = {
        path: layer
        for path, layer in tuned.backbone.named_modules()
        if isinstance(layer, UpdatedModule)
    }
    called: set[nn.Module] = set()
    hooks = [
        layer.register_forward_pre_hook(lambda module, _: called.add(module))
        for layer in layers.values()
    ]
    try:
        tuned(torch.zeros(1, 3, size, size))
    finally:
        for hook in hooks:
            hook.remove()
    return [path for path, layer in layers.items() if layer not in called]
