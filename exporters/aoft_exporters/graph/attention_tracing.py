"""Trace each attention as one node, which ``attention_lowering`` replaces."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

__all__ = ["DOMAIN", "attention_as_one_node"]

DOMAIN = "aoft"
"""Operator domain of the node."""


@contextlib.contextmanager
def attention_as_one_node() -> Iterator[None]:
    """Context manager: ``torch.onnx.export`` writes attention as ``aoft::Attention``.

    Inputs of other than four axes (sam, twins, nest, hiera) are flattened into the heads of a batch
    of one. Attention that is causal, has dropout or a boolean mask is exported by torch as usual.
    """
    import torch

    functional: Any = torch.nn.functional
    fused = functional.scaled_dot_product_attention

    def one_node(
        q: Any,
        k: Any,
        v: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **others: Any,
    ) -> Any:
        if q.dim() != 4:
            axes = q.shape[:-2]
            if attn_mask is not None:
                attn_mask = attn_mask.expand(*axes, *attn_mask.shape[-2:]).flatten(0, -3)[None]
            q, k, v = (tensor.flatten(0, -3)[None] for tensor in (q, k, v))
            flat = one_node(q, k, v, attn_mask, dropout_p, is_causal, scale, **others)
            return flat[0].unflatten(0, axes)
        additive = attn_mask is None or attn_mask.dtype == q.dtype
        if is_causal or dropout_p or others or not additive:
            options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, **others}
            return fused(q, k, v, attn_mask, **options)
        heads = q.shape[1] if isinstance(q.shape[1], int) else 0  # 0: dynamic
        width = int(q.shape[-1])
        factor = 1 / math.sqrt(width) if scale is None else scale
        attributes: dict[str, Any] = {"heads": heads, "width": width, "scale": factor}
        inputs = (q, k, v) if attn_mask is None else (q, k, v, attn_mask)
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::Attention",
            inputs,
            attributes,
            dtype=q.dtype,
            shape=(*q.shape[:-1], v.shape[-1]),
            version=1,
        )

    functional.scaled_dot_product_attention = one_node
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = fused
