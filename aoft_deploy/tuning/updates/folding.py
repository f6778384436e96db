"""Fold: add deltas to the rows of a weight, out of place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aoft_deploy.tuning.updates.delta import Delta, Rows

__all__ = ["fold_rows"]


def fold_rows(
    weight: Tensor, bias: Tensor | None, deltas: Sequence[tuple[Rows, Delta]]
) -> tuple[Tensor, Tensor | None]:
    """Fold several deltas into one map, each into its own rows.

    Args:
        weight: (out, …).
        bias: (out,) or None.
        deltas: Disjoint row ranges and the delta of each.

    Returns:
        New weight and bias; the arguments are not changed.
    """
    # A channels_last weight has no view as a matrix.
    weight = weight.clone(memory_format=torch.contiguous_format)
    bias = None if bias is None else bias.clone()
    if torch.compiler.is_exporting() and len(deltas) > 1:  # a graph copies W for every write
        return _folded_pieces(weight, bias, deltas)
    for (start, stop), delta in deltas:
        delta.fold_(weight[start:stop], None if bias is None else bias[start:stop])
    return weight, bias


def _folded_pieces(
    weight: Tensor, bias: Tensor | None, deltas: Sequence[tuple[Rows, Delta]]
) -> tuple[Tensor, Tensor | None]:
    """The folded map, concatenated from its row ranges."""
    weights, biases, done = list[Tensor](), list[Tensor](), 0
    for (start, stop), delta in [*deltas, ((len(weight), len(weight)), None)]:
        for first, last, change in ((done, start, None), (start, stop, delta)):
            if first < last:
                piece = weight[first:last].clone()
                shifted = None if bias is None else bias[first:last].clone()
                if change is not None:
                    change.fold_(piece, shifted)
                weights.append(piece)
                biases += [] if shifted is None else [shifted]
        done = stop
    return torch.cat(weights), torch.cat(biases) if biases else None
