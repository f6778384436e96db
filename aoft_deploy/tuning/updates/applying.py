"""Apply: a linear map with deltas in training, with structured gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from aoft_deploy.tuning.updates.delta import Rows, WeightDelta
from aoft_deploy.tuning.updates.folding import folded_briefly
from aoft_deploy.tuning.updates.products import product

__all__ = ["Recipe", "apply_linear", "compute_dtype"]


@dataclass(frozen=True)
class Recipe:
    """How to compute a tensor again, which saves the memory to keep it for the backward pass.

    Attributes:
        source: A tensor that is kept anyway.
        compute: Gives the same tensor from the source, bit for bit.
    """

    source: Tensor
    compute: Callable[[Tensor], Tensor]

    def attach(self, result: Tensor) -> None:
        """State that ``result`` can be computed by this recipe, as long as it is not changed."""
        result.recipe = self  # type: ignore[attr-defined]

    @staticmethod
    def of(tensor: Tensor) -> Recipe | None:
        """The recipe of a tensor, or None if it has none or was changed in place."""
        recipe: Recipe | None = getattr(tensor, "recipe", None)
        return recipe if tensor._version == 0 else None


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a product with x: autocast's if autocast is enabled, otherwise that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def apply_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    deltas: Sequence[tuple[Rows, WeightDelta]],
) -> Tensor:
    """The output of a frozen linear map with deltas, in training.

    The forward folds the deltas into W, which is cheap because W is small compared to the
    activations of a batch, and then costs as much as the plain map. The backward recomputes the
    folded weight instead of storing it. It computes the gradients from the structure of the deltas,
    without a dense weight gradient unless a gain needs one.

    Args:
        x: (..., in).
        weight: Frozen W, (out, in).
        bias: Frozen b, (out,) or None.
        deltas: Row ranges and their deltas.

    Returns:
        (..., out) in autocast's dtype if autocast is enabled, otherwise in that of x.
    """
    layout = [(rows, delta.names()) for rows, delta in deltas]
    tensors = [getattr(delta, n) for _, delta in deltas for n in delta.names()]
    result: Tensor = _FoldedLinear.apply(x, Recipe.of(x), weight, bias, layout, *tensors)
    return result


def _rebuild(
    layout: Sequence[tuple[Rows, tuple[str, ...]]], tensors: Sequence[Tensor]
) -> list[tuple[Rows, WeightDelta]]:
    remaining = iter(tensors)
    return [(rows, WeightDelta(**{n: next(remaining) for n in names})) for rows, names in layout]


class _FoldedLinear(torch.autograd.Function):
    """x ↦ x fold(W)ᵀ + fold(b) with structured gradients for the deltas."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        recipe: Recipe | None,
        weight: Tensor,
        bias: Tensor | None,
        layout: Any,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.layout, ctx.compute = layout, compute_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            inputs = x.to(ctx.compute)
            deltas = _rebuild(layout, tensors)
            out = product(inputs, *folded_briefly(weight, bias, deltas, ctx.compute))
        ctx.again = None if recipe is None else recipe.compute
        kept = inputs if recipe is None else recipe.source
        ctx.save_for_backward(kept, weight, *tensors)
        ctx.dtype = x.dtype
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        kept, weight, *tensors = ctx.saved_tensors
        deltas = _rebuild(ctx.layout, tensors)
        with torch.autocast(grad.device.type, enabled=False):
            inputs = kept if ctx.again is None else ctx.again(kept).to(ctx.compute)
            grad_x = None
            if ctx.needs_input_grad[0]:
                folded, _ = folded_briefly(weight, None, deltas, grad.dtype)
                grad_x = product(grad, folded.mT).to(ctx.dtype)
            parts = _gradients(inputs.flatten(0, -2), grad.flatten(0, -2), weight, deltas)
            flat = [
                parts[i][name].to(getattr(deltas[i][1], name).dtype)
                for i, (_, names) in enumerate(ctx.layout)
                for name in names
            ]
        return (grad_x, None, None, None, None, *flat)


def _gradients(
    x: Tensor, grad: Tensor, weight: Tensor, deltas: Sequence[tuple[Rows, WeightDelta]]
) -> list[dict[str, Tensor]]:
    """Gradients of the deltas' fields, from the gradients of the output.

    Only gains need a dense out × in product. The low-rank parts of all rows share four thin
    products.

    Args:
        x: Inputs, (tokens, in).
        grad: Gradients of the outputs, (tokens, out).
        weight: W, (out, in).
        deltas: Row ranges and deltas.

    Returns:
        The gradients of each delta's fields by name, in float32 or wider.
    """
    wide = torch.promote_types(grad.dtype, torch.float32)
    parts = _low_rank_gradients(x, grad, deltas, wide)
    for ((start, stop), delta), part in zip(deltas, parts, strict=True):
        rows = grad[:, start:stop]
        if delta.diagonal is not None:
            d = delta.diagonal.shape[-1]
            part["diagonal"] = (rows[:, :d].to(wide) * x[:, :d].to(wide)).sum(0)
        if delta.gain_out is not None and delta.gain_in is not None:
            dense = (rows.mT @ x).to(wide) * weight[start:stop]
            part["gain_out"] = delta.gain_in.to(wide) @ dense.mT
            part["gain_in"] = delta.gain_out.to(wide) @ dense
        if delta.shift is not None:
            part["shift"] = rows.sum(0, dtype=wide)
    return parts


def _low_rank_gradients(
    x: Tensor, grad: Tensor, deltas: Sequence[tuple[Rows, WeightDelta]], wide: torch.dtype
) -> list[dict[str, Tensor]]:
    """Gradients of every ``left`` and ``right``, computed together."""
    pairs = [
        (F.pad(delta.left, (start, grad.shape[-1] - stop)), delta.right)
        for (start, stop), delta in deltas
        if delta.left is not None and delta.right is not None
    ]
    if not pairs:
        return [{} for _ in deltas]
    left = torch.cat([left for left, _ in pairs]).to(grad.dtype)
    right = torch.cat([right for _, right in pairs]).to(x.dtype)
    grad_left = ((x @ right.mT).mT @ grad).to(wide)
    grad_right = ((grad @ left.mT).mT @ x).to(wide)
    parts: list[dict[str, Tensor]] = []
    done = 0
    for (start, stop), delta in deltas:
        rank = 0 if delta.left is None else len(delta.left)
        chunk = slice(done, done + rank)
        parts.append(
            {"left": grad_left[chunk, start:stop], "right": grad_right[chunk]} if rank else {}
        )
        done += rank
    return parts
