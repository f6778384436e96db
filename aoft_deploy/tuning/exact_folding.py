"""Folding in float64: the exact deltas of updates, added to weights and rounded once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aoft_deploy.errors import CheckpointError
from aoft_deploy.tuning.updates.delta import Delta, Rows
from aoft_deploy.tuning.updates.update import Update

__all__ = ["exact_deltas", "fold_exactly", "store"]

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
            store(wide, new_weight[block], weight[block])
            if bias is not None and wide_bias is not None and new_bias is not None:
                store(wide_bias, new_bias[block], bias[block])
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


def store(wide: Tensor, new: Tensor, old: Tensor) -> None:
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
