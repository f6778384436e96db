"""Attention in training, on a CPU: it keeps little for the backward pass, and copies little."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from aoft_deploy.tuning.updates.applying import compute_dtype

__all__ = ["attention", "unbind"]

SCORES = 1 << 17
"""Attention scores of the images that the backward pass computes together, to stay in a cache."""


def unbind(unbound: Any, packed: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
    """``Tensor.unbind``; the backward pass joins gradients that lie in one tensor without a copy.

    Args:
        unbound: ``Tensor.unbind``.
        packed: Queries, keys and values, such as (3, batch, heads, tokens, width).
        dim: The dimension to remove.
    """
    if dim != 0 or packed.device.type != "cpu":
        result: tuple[Tensor, ...] = unbound(packed, dim)
        return result
    parts: tuple[Tensor, ...] = _Unbind.apply(packed)
    return parts


class _Unbind(torch.autograd.Function):
    """The parts of a tensor along its first dimension, as views."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor) -> tuple[Tensor, ...]:
        return packed.unbind(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _joined(grads)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """``torch.stack(parts)``, as a view if the parts are equally distant in one tensor."""
    first = parts[0]
    offsets = [part.storage_offset() for part in parts]
    distance = offsets[-1] - offsets[-2] if len(parts) > 1 else 0
    memory = {part.untyped_storage().data_ptr() for part in parts}
    layouts = {(part.dtype, part.shape, part.stride()) for part in parts}
    expected = [offsets[0] + i * distance for i in range(len(parts))]
    if distance > 0 and len(memory) == len(layouts) == 1 and offsets == expected:
        return first.as_strided((len(parts), *first.shape), (distance, *first.stride()))
    return torch.stack(list(parts))


def attention(
    attend: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention``; plain attention on a CPU keeps no output.

    Args:
        attend: ``F.scaled_dot_product_attention``, whose other arguments follow.
        q: (batch, heads, queries, width).
        k: (batch, heads, keys, width).
        v: (batch, heads, keys, width).
        attn_mask: As for ``attend``.
        dropout_p: As for ``attend``.
        is_causal: As for ``attend``.
        scale: As for ``attend``.
        enable_gqa: As for ``attend``.
    """
    result: Tensor
    plain = attn_mask is None and not (dropout_p or is_causal or enable_gqa)
    same = q.dtype == k.dtype == v.dtype == compute_dtype(q) and q.dim() == k.dim() == 4
    if plain and same and q.device.type == "cpu" and q.shape[:2] == k.shape[:2]:
        result = _Attention.apply(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)
    else:
        result = attend(
            q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return result


class _Attention(torch.autograd.Function):
    """softmax(scale · q kᵀ) v."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients by the definition, of a few images at a time.

        Scores, probabilities and their gradients are computed in float32 or wider, and rounded to
        the dtype of q for the products that give the results.
        """
        q, k, v = ctx.saved_tensors
        grads = _empty_gradients(q, k, v)
        queries, keys, heads = q.shape[2], k.shape[2], q.shape[1]
        step = min(len(q), max(1, SCORES // (heads * queries * keys)))
        work = _Work((step * heads, queries, keys), grad.dtype, ctx.scale)
        with torch.autocast(grad.device.type, enabled=False):
            for start in range(0, len(q), step):
                images = slice(start, start + step)
                # One image is a view; several are copied.
                parts = [each[images].flatten(0, 1) for each in (q, k, v, grad)]
                for into, part in zip(grads, work.gradients(*parts), strict=True):
                    into[images] = part.view(-1, heads, *part.shape[1:])
        return *grads, None


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors for the gradients, in the layout of a product that gave q, k and v together."""
    if q.shape != k.shape or k.shape != v.shape:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    batch, heads, tokens, width = q.shape
    packed = q.new_empty(batch, tokens, 3, heads, width).permute(2, 0, 3, 1, 4)
    return packed[0], packed[1], packed[2]


class _Work:
    """Memory for the probabilities of a few images and their gradients.

    Args:
        shape: (images x heads, queries, keys).
        narrow: Dtype of the queries, keys and values.
        scale: Factor of the scores.
    """

    def __init__(self, shape: tuple[int, int, int], narrow: torch.dtype, scale: float) -> None:
        self.scale, self.wide = scale, torch.promote_types(narrow, torch.float32)
        self.tensors = [torch.empty(shape, dtype=self.wide) for _ in range(3)]
        self.rounded = self.tensors[1:]
        if narrow != self.wide:
            self.rounded = [torch.empty(shape, dtype=narrow) for _ in range(2)]

    def gradients(
        self, q: Tensor, k: Tensor, v: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v.

        Args:
            q: (images x heads, queries, width).
            k: (images x heads, keys, width).
            v: (images x heads, keys, width).
            grad: Gradient of the output, (images x heads, queries, width).
        """
        scores, chances, slopes = (each[: len(q)] for each in self.tensors)
        torch.bmm(q.to(self.wide) * self.scale, k.to(self.wide).mT, out=scores)
        torch.softmax(scores, -1, out=chances)
        torch.bmm(grad.to(self.wide), v.to(self.wide).mT, out=scores)
        torch._softmax_backward_data(scores, chances, -1, self.wide, grad_input=slopes)
        slopes.mul_(self.scale)
        narrow_chances, narrow_slopes = (each[: len(q)] for each in self.rounded)
        if narrow_slopes.dtype != self.wide:
            narrow_chances.copy_(chances)
            narrow_slopes.copy_(slopes)
        return (
            torch.bmm(narrow_slopes, k),
            torch.bmm(narrow_slopes.mT, q),
            torch.bmm(narrow_chances.mT, grad),
        )
