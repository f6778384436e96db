"""Mix: a linear map for a batch in which every sample has its own deltas."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from aoft_deploy.tuning.updates.delta import Delta, Rows, WeightDelta

__all__ = ["mix_linear"]

FUSED_DIAGONAL = 16
"""Diagonals up to this length are fused into the low-rank product."""


def mix_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, deltas: Sequence[tuple[Rows, Delta]]
) -> Tensor:
    """The output of a linear map with each sample's own deltas.

    Equal to calling ``mix`` of every delta. But the bias, the shifts and all low-rank parts are
    fused into one thin product and one addition, so a mixed batch passes over the output as often
    as the plain map does.

    Args:
        x: Input, (batch, tokens, in).
        weight: W, (out, in), shared by all samples.
        bias: b, (out,) or None.
        deltas: Disjoint, ascending row ranges and their deltas, whose fields have an axis
            ``batch``.

    Returns:
        (batch, tokens, out).
    """
    weight_deltas = [(rows, delta) for rows, delta in deltas if isinstance(delta, WeightDelta)]
    if len(weight_deltas) < len(deltas):
        y, rest = F.linear(x, weight, bias), list(deltas)
    else:
        product, rest = _thin_product(x, bias, len(weight), weight_deltas)
        y = F.linear(x, weight, bias) if product is None else F.linear(x, weight) + product
    parts, done = [], 0
    for (start, stop), delta in rest:
        parts += [y[..., done:start], delta.mix(x, y[..., start:stop], weight[start:stop])]
        done = stop
    return torch.cat([*parts, y[..., done:]], dim=-1) if len(parts) > 2 or done else y


def _thin_product(
    x: Tensor, bias: Tensor | None, features: int, deltas: Sequence[tuple[Rows, WeightDelta]]
) -> tuple[Tensor | None, list[tuple[Rows, Delta]]]:
    """The fused summand of x Wᵀ, including the bias, and the parts of the deltas that remain.

    The summand is None if nothing is fused, or has one token if it is constant.
    """
    rights, lefts, constants, rest = [], [], [], list[tuple[Rows, Delta]]()
    shared = max((_fused_diagonal(delta) for _, delta in deltas), default=0)
    diagonals = []
    for (start, stop), delta in deltas:
        around = (start, features - stop)
        if delta.left is not None and delta.right is not None:
            rights.append(delta.right)
            lefts.append(F.pad(delta.left, around))
        d = _fused_diagonal(delta)
        if d:
            square = F.pad(torch.diag_embed(delta.diagonal), (0, 0, 0, shared - d))  # type: ignore[arg-type]
            diagonals.append(F.pad(square, (start, features - start - d)))
        if delta.shift is not None:
            constants.append(F.pad(delta.shift, around))
        long = None if d else delta.diagonal
        remaining = replace(delta, left=None, right=None, shift=None, diagonal=long)
        if remaining.names():
            rest.append(((start, stop), remaining))
    if bias is not None:
        constants.append(bias)
    constant = functools.reduce(torch.add, constants) if constants else None
    if not rights and not diagonals:
        changed = len(constants) > (bias is not None)
        return (constant[..., None, :] if changed and constant is not None else None), rest
    inner, outer = [], []
    if rights:
        inner.append(x @ torch.cat(rights, dim=-2).mT.to(x.dtype))
        outer.append(torch.cat(lefts, dim=-2))
    if diagonals:
        inner.append(x[..., :shared])
        outer.append(functools.reduce(torch.add, diagonals))
    if constant is not None:
        inner.append(torch.ones_like(x[..., :1]))
        outer.append(
            constant.expand(x.shape[0], 1, -1) if constant.dim() == 1 else constant[:, None]
        )
    return torch.cat(inner, dim=-1) @ torch.cat(outer, dim=-2).to(x.dtype), rest


def _fused_diagonal(delta: WeightDelta) -> int:
    """Length of the diagonal that is fused into the thin product; 0 for none or a long one."""
    d = 0 if delta.diagonal is None else delta.diagonal.shape[-1]
    return d if d <= FUSED_DIAGONAL else 0
