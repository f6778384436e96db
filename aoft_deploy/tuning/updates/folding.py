"""Fold: add deltas to the rows of a weight, out of place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aoft_deploy.tuning.updates.delta import Delta, Rows
from aoft_deploy.tuning.updates.scratch import scratch

__all__ = ["fold_rows", "folded_briefly"]


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


def folded_briefly(
    weight: Tensor,
    bias: Tensor | None,
    deltas: Sequence[tuple[Rows, Delta]],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """The map of ``fold_rows``, rounded to a dtype, for one product. Autograd does not record it.

    On a CPU the weight lies in ``scratch``. The rows of each delta are folded in the dtype of the
    weight and then rounded, while they are in the cache.

    Args:
        weight: (out, in).
        bias: (out,) or None.
        deltas: Disjoint, ascending row ranges and the delta of each.
        dtype: Dtype of the results.
    """
    if weight.device.type != "cpu" or torch.compiler.is_compiling():  # a graph has own memory
        folded, bias = fold_rows(weight, bias, deltas)
        return folded.to(dtype), None if bias is None else bias.to(dtype)
    bias = None if bias is None else bias.clone()
    folded, done = scratch(weight.shape, dtype), 0
    for (start, stop), delta in deltas:
        folded[done:start] = weight[done:start]
        rows = folded[start:stop]
        block = rows if dtype == weight.dtype else scratch(rows.shape, weight.dtype)
        block.copy_(weight[start:stop])
        delta.fold_(block, None if bias is None else bias[start:stop])
        if block is not rows:
            rows.copy_(block)
        done = stop
    folded[done:] = weight[done:]
    return folded, None if bias is None else bias.to(dtype)


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
