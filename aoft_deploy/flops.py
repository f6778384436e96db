"""How much arithmetic a model takes, for the share of a machine's limit."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["flops_per_image"]


def flops_per_image(model: nn.Module, size: int) -> int | None:
    """Floating point operations of matrix products, convolutions and attention for one image.

    A multiplication and an addition count as two. ViT-B/16 at 224 pixels takes 35.1e9.

    Args:
        model: A plain model of normalised images; nothing is computed with it.
        size: Side of the square input, in pixels.

    Returns:
        None where the model cannot be gone through without numbers.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    counter: Any = FlopCounterMode(display=False)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), counter:
            model(torch.zeros(1, 3, size, size))
    except Exception:  # fake tensors raise classes of their own, of many kinds
        return None
    return int(counter.get_total_flops()) or None
