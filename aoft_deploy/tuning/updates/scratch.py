"""Memory of a CPU that is used again, for weights that only one product needs."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["rounded", "scratch"]


class _Buffers(threading.local):
    """The buffers of a thread: one for each dtype, as long as the largest weight so far."""

    def __init__(self) -> None:
        self.by_dtype: dict[torch.dtype, Tensor] = {}


_BUFFERS = _Buffers()


def scratch(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor on the CPU with arbitrary values.

    The next call of the same thread with the same dtype gives the same memory. New memory for each
    weight would cost more: the system clears its pages, and the gaps that it leaves between tensors
    of other lengths raise the peak.
    """
    count = math.prod(shape)
    found = _BUFFERS.by_dtype.get(dtype)
    if found is None or found.numel() < count:
        found = _BUFFERS.by_dtype[dtype] = torch.empty(count, dtype=dtype)
    return found[:count].view(*shape)


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in a dtype: itself, or a copy that on a CPU lies in ``scratch``."""
    if weight.dtype == dtype or weight.device.type != "cpu":
        return weight.to(dtype)
    return scratch(weight.shape, dtype).copy_(weight)
