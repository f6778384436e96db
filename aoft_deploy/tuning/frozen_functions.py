"""Functions of frozen layers in training, which keep little for the backward pass.

PyTorch keeps what the gradient of every argument may need. A frozen layer needs the gradient of its
input only, so less suffices:

linear      The weight. Under autocast it is cast again in the backward pass, into memory that all
            layers share.
attention   Queries, keys and values. The probabilities are computed again, image by image, and the
            three gradients lie in one tensor, as the layer before needs them.
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

from aoft_deploy.tuning.frozen_attention import attention, unbind
from aoft_deploy.tuning.updates.applying import Recipe, compute_dtype
from aoft_deploy.tuning.updates.products import product
from aoft_deploy.tuning.updates.scratch import rounded

__all__ = ["FrozenFunctions"]


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
            return product(x.to(compute), rounded(weight, compute), shift)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            return product(grad, rounded(weight, grad.dtype).mT).to(ctx.dtype), None, None


def _layer_norm(norm: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    result: Tensor = norm(x, *args, **kwargs)
    parameters = (each for each in (*args, *kwargs.values()) if isinstance(each, Tensor))
    if _is_frozen(x, *parameters):
        Recipe(x.detach(), lambda source: norm(source, *args, **kwargs)).attach(result)
    return result


_REPLACEMENTS: Mapping[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.scaled_dot_product_attention: attention,
    Tensor.unbind: unbind,
    F.layer_norm: _layer_norm,
}
