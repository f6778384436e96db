"""Functions of frozen layers in training, which keep little for the backward pass.

PyTorch keeps what the gradient of every argument may need. A frozen layer needs the gradient of its
input only, so less suffices:

linear      The weight. Under autocast it is cast again in the backward pass.
attention   Queries, keys and values. The probabilities are computed again, image by image.
layer norm  An updated layer that reads the normalised tokens keeps the norm's input instead, which
            the norm keeps anyway, and normalises it again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from aoft_deploy.tuning.updates.applying import Recipe, compute_dtype
from aoft_deploy.tuning.updates.products import product

__all__ = ["FrozenFunctions"]

SCORES = 1 << 19
"""Attention scores of the images that the backward pass computes together, to stay in a cache."""


class FrozenFunctions(TorchFunctionMode):
    """Context manager: frozen layers on a CPU use the functions of this module."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call a function of PyTorch, or the one that replaces it."""
        kwargs = kwargs or {}
        replacement = _REPLACEMENTS.get(func)
        if replacement is not None and torch.is_grad_enabled():
            return replacement(func, *args, **kwargs)
        return func(*args, **kwargs)


def _is_frozen(x: Tensor, *parameters: Tensor | None) -> bool:
    return x.device.type == "cpu" and not any(p is not None and p.requires_grad for p in parameters)


def _linear(linear: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not _is_frozen(x, weight, bias):
        result: Tensor = linear(x, weight, bias)
        return result
    result = _FrozenLinear.apply(x, weight, bias)
    return result


class _FrozenLinear(torch.autograd.Function):
    """x ↦ x Wᵀ + b with constant W and b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        compute = compute_dtype(x)
        ctx.save_for_backward(weight)
        ctx.dtype = x.dtype
        with torch.autocast(x.device.type, enabled=False):
            shift = None if bias is None else bias.to(compute)
            return product(x.to(compute), weight.to(compute), shift)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            return product(grad, weight.to(grad.dtype).mT).to(ctx.dtype), None, None


def _attention(
    attention: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    result: Tensor
    plain = attn_mask is None and not (dropout_p or is_causal or enable_gqa)
    same = q.dtype == k.dtype == v.dtype == compute_dtype(q) and q.dim() == k.dim() == 4
    if plain and same and q.device.type == "cpu" and q.shape[:2] == k.shape[:2]:
        result = _Attention.apply(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)
    else:
        result = attention(
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
        saved: tuple[Tensor, Tensor, Tensor] = ctx.saved_tensors
        narrow, wide = grad.dtype, torch.promote_types(grad.dtype, torch.float32)
        grads = [torch.empty_like(each) for each in saved]
        scores_of_one = saved[0][0].shape[:2].numel() * saved[1].shape[2]
        step = max(1, SCORES // scores_of_one)
        with torch.autocast(grad.device.type, enabled=False):
            for start in range(0, len(grad), step):
                images = slice(start, start + step)
                q, k, v, above = (each[images] for each in (*saved, grad))
                scores = (q.to(wide) * ctx.scale) @ k.to(wide).mT
                chances = scores.softmax(-1)
                slopes = above.to(wide) @ v.to(wide).mT
                slopes = torch._softmax_backward_data(slopes, chances, -1, wide)
                slopes, chances = slopes.mul_(ctx.scale).to(narrow), chances.to(narrow)
                for into, part in zip(
                    grads, (slopes @ k, slopes.mT @ q, chances.mT @ above), strict=True
                ):
                    into[images] = part
        return grads[0], grads[1], grads[2], None


def _layer_norm(norm: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    result: Tensor = norm(x, *args, **kwargs)
    parameters = (each for each in (*args, *kwargs.values()) if isinstance(each, Tensor))
    if _is_frozen(x, *parameters):
        Recipe(x.detach(), lambda source: norm(source, *args, **kwargs)).attach(result)
    return result


_REPLACEMENTS: Mapping[Any, Callable[..., Tensor]] = {
    F.linear: _linear,
    F.scaled_dot_product_attention: _attention,
    F.layer_norm: _layer_norm,
}
