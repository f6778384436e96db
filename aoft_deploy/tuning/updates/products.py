"""Products with frozen weights, by the library that is faster on this processor."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["product"]

CPUINFO = Path("/proc/cpuinfo")


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product x Wᵀ + b.

    PyTorch multiplies float32 matrices on a CPU with MKL, whose fastest kernels are for Intel's
    processors. On AMD's, oneDNN is faster. bfloat16 is always multiplied by oneDNN, but
    ``F.linear`` writes the bias into the output before; here oneDNN adds it. The choice depends on
    the processor alone, so equal runs stay equal. Autograd does not record the product.

    Args:
        x: (..., in).
        weight: W, (out, in), of the same dtype; it may be a transposed view.
        bias: b, (out,), or None.

    Returns:
        (..., out).
    """
    direct = x.dtype == torch.float32 and _prefers_onednn()
    direct |= x.dtype == torch.bfloat16 and bias is not None and _adds_bias()
    if x.device.type == "cpu" and direct:
        with torch.no_grad():
            result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return result
    return F.linear(x, weight, bias)


@cache
def _adds_bias() -> bool:
    """Whether PyTorch has oneDNN with the product, in bfloat16 on this processor."""
    libraries: Any = torch.backends  # their functions have no types
    known = libraries.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return known and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
def _prefers_onednn() -> bool:
    """Whether PyTorch has both libraries, and the processor is AMD's."""
    libraries: Any = torch.backends  # their functions have no types
    both = libraries.mkl.is_available() and libraries.mkldnn.is_available()
    if not both or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        return "AuthenticAMD" in CPUINFO.read_text("ascii", "replace")
    except OSError:
        return False
