"""Fold in float64: add exact deltas to weights and round once."""

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

__all__ = ["exact_deltas", "fold_exactly", "round_into"]

BLOCK_SIZE = 2**18
"""Number of weights that are folded at once, in a float64 buffer that fits the processor cache."""

PAGE = 4096
"""Bytes of the smallest memory page; larger pages are multiples of it."""


@torch.no_grad()
def exact_deltas(updates: Iterable[Update]) -> dict[Update, Any]:
    """The float64 delta of every update. Updates of equal kind share one call of the formula."""
    kinds: dict[Any, list[Update]] = defaultdict(list)
    for update in updates:
        kinds[update.kind()].append(update)
    deltas: dict[Update, Any] = {}
    for group in kinds.values():
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
    """Fold in float64 and round once to the weight's dtype.

    Args:
        weight: (out, …).
        bias: (out,) or None.
        deltas: Disjoint, ascending row ranges and the float64 delta of each.
        in_place: Write into ``weight`` itself.

    Returns:
        Weight and bias. Entries that no delta changes keep their bits.

    Raises:
        CheckpointError: A folded value is not finite.
    """
    new_weight = weight if in_place else _empty_like(weight)
    new_bias = None if bias is None else bias.clone()
    deltas = list(deltas)
    step = max(1, BLOCK_SIZE * len(weight) // weight.numel())
    if weight.dim() > 2 or any(delta.mixes_rows for _, delta in deltas):
        step = len(weight)
    buffer = torch.empty((step, *weight.shape[1:]), dtype=torch.float64, device=weight.device)
    done = 0
    for (start, stop), delta in deltas:
        if not in_place:
            new_weight[done:start] = weight[done:start]
        for first in range(start, stop, step):
            block = slice(first, min(first + step, stop))
            exact = buffer[: block.stop - first].copy_(weight[block])
            exact_bias = None if bias is None else bias[block].to(torch.float64, copy=True)
            delta.fold_(exact, exact_bias, first - start)
            round_into(exact, new_weight[block], weight[block])
            if bias is not None and exact_bias is not None and new_bias is not None:
                round_into(exact_bias, new_bias[block], bias[block])
        done = stop
    if not in_place:
        new_weight[done:] = weight[done:]
    return new_weight, new_bias


def _empty_like(like: Tensor) -> Tensor:
    """A tensor of arbitrary values. NumPy's memory uses huge pages on Linux.

    One thread touches every page first. If the threads of a copy met in a new huge page, each would
    clear one of its own, and all but one would be thrown away.
    """
    if like.device.type != "cpu":
        return torch.empty_like(like)
    data = np.empty(like.numel() * like.element_size(), np.uint8)
    data[::PAGE] = 0
    return torch.from_numpy(data).view(like.dtype).view(like.shape)


def round_into(exact: Tensor, new: Tensor, old: Tensor) -> None:
    """Round ``exact`` into ``new``. Zeros that equal ``old`` keep their sign.

    Raises:
        CheckpointError: A rounded value is not finite.
    """
    if _has_negative_zero(old):
        exact = exact.copysign(torch.where(exact == old, old, exact))
    new.copy_(exact)
    if not new.sum().isfinite() and not new.isfinite().all():
        raise CheckpointError(
            f"Folding gives values that are not finite in {old.dtype}: the trained parameters are "
            "too large or damaged."
        )


def _has_negative_zero(tensor: Tensor) -> bool:
    """Whether −0.0 occurs. As an integer of the same width, its bits are the smallest value."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return bool(tensor.view(integer).amin() == torch.iinfo(integer).min)
