"""Write low-rank updates as the two matrices of LoRA, for programs that support only LoRA."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aoft_deploy.errors import SettingError
from aoft_deploy.tuning.tuned_model import TunedModel
from aoft_deploy.tuning.updated_layers import UpdatedModule
from aoft_deploy.tuning.updates.aoft import AoftLowRank
from aoft_deploy.tuning.updates.low_rank import LowRank
from aoft_deploy.tuning.updates.orthogonal import approximately_orthogonal
from aoft_deploy.tuning.updates.update import Update

__all__ = ["bounded_rank", "bypassed_layers", "low_rank_factors"]

Factors = tuple[Tensor, Tensor]
"""A (r, in) and B (out, r) of ΔW = B A, in float64."""


@torch.no_grad()
def low_rank_factors(tuned: TunedModel) -> dict[str, Factors]:
    """The change of every layer as ΔW = B A.

    Sites that are parts of one layer share one pair of matrices: A contains the rows of all parts,
    and the columns of B for a part are zero outside the part's own rows.

    Args:
        tuned: A model with the updates of LoRA or of AOFT as LoRA.

    Returns:
        A (r, in) and B (out, r) in float64 by the layer's path, with r ≤ min(in, out).

    Raises:
        SettingError: The method has other updates, or none.
    """
    sites = {update: site for site, update in tuned.updates.items()}
    if not sites or tuned.direct != tuned.classifier:
        raise SettingError(
            f"{tuned.method} has no low-rank updates, so it cannot be written as LoRA: export "
            'with `to="onnx"`.'
        )
    for update, site in sites.items():
        if type(update) not in (LowRank, AoftLowRank):
            raise SettingError(
                f"{tuned.method} cannot be written as LoRA, because its {type(update).__name__} at "
                f'{site} is no low-rank change of a linear map: export with `to="onnx"`.'
            )
    layers = _updated_layers(tuned)
    for path, layer in layers.items():
        if not isinstance(layer.base, nn.Linear):
            raise SettingError(
                f"{tuned.method} cannot be written as LoRA, because {path} is a "
                f"{type(layer.base).__name__}, where LoRA has another form: export with "
                '`to="onnx"`.'
            )
    return {path: _stacked(layer) for path, layer in layers.items()}


def bounded_rank(a: Tensor, b: Tensor) -> Factors:
    """The same product B A with r ≤ min(in, out).

    Args:
        a: (r, in).
        b: (out, r).

    Returns:
        Both unchanged, or the product and an identity if r is larger than that.
    """
    if len(a) <= min(len(b), a.shape[1]):
        return a, b
    product = b @ a
    eye = torch.eye(min(product.shape), dtype=a.dtype)
    return (product, eye) if len(b) < a.shape[1] else (eye, product)


@torch.no_grad()
def bypassed_layers(tuned: TunedModel, height: int, width: int) -> list[str]:
    """Paths of updated layers whose weight the model reads without calling them.

    timm's beit, fused eva and swinv2 attentions do this with qkv. PEFT applies LoRA when a layer is
    called, so its LoRA has no effect there until it is merged.

    Args:
        tuned: A model with updates, in evaluation mode.
        height: Of its input, in pixels.
        width: Of its input, in pixels.
    """
    layers = _updated_layers(tuned)
    called: set[nn.Module] = set()
    hooks = [
        layer.register_forward_pre_hook(lambda module, _: called.add(module))
        for layer in layers.values()
    ]
    try:
        tuned(torch.zeros(1, 3, height, width))
    finally:
        for hook in hooks:
            hook.remove()
    return [path for path, layer in layers.items() if layer not in called]


def _updated_layers(tuned: TunedModel) -> dict[str, UpdatedModule]:
    modules = tuned.backbone.named_modules()
    return {path: layer for path, layer in modules if isinstance(layer, UpdatedModule)}


def _stacked(layer: UpdatedModule) -> Factors:
    out = len(layer.base.get_parameter("weight"))
    parts = [_factors(update) for update in layer.updates if isinstance(update, Update)]
    a = torch.cat([part for part, _ in parts])
    b = a.new_zeros(out, len(a))
    column = 0
    for (start, stop), (_, part) in zip(layer.rows, parts, strict=True):
        b[start:stop, column : column + part.shape[1]] = part
        column += part.shape[1]
    return bounded_rank(a, b)


def _factors(update: Update) -> Factors:
    """A (r, in) and B (rows, r) of one update, with the dense AO(q)."""
    parameters = {name: p.detach().double() for name, p in update.named_parameters()}
    if isinstance(update, LowRank):
        return parameters["a"], parameters["b"] * update.scale
    assert isinstance(update, AoftLowRank)
    options, q_down = update.options, parameters["q_down"]
    pair = [q_down, parameters.get("q_up", q_down)]
    if options.strict:
        pair = [q / q.norm().clamp(min=1e-12) for q in pair]
    down, up = (approximately_orthogonal(q, options.rank) for q in pair)
    lam = parameters.get("rank_scale", down.new_ones(options.rank))
    return options.scale * lam[:, None] * down.mT, up
