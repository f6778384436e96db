"""Count the FLOPs of a model, to compare its speed with the machine's peak.

The model runs on fake tensors, and every matrix product is counted. Attention runs as the two
products of its definition, so the count depends neither on PyTorch's kernels and version nor on
timm's setting for fused attention.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from aoft_deploy.data.preprocessing import Preprocessing

__all__ = ["flops_per_image", "flops_text"]

PRODUCT = re.compile(
    r"(^|_)(mm|bmm|matmul|mv|dot|linear|trilinear|einsum|conv\w*|attention|mha|transformer|lstm|gru"
    r"|rnn)(_|$)"
)
"""Matches the names of operators that multiply matrices, including those that are not in COUNTS."""


def flops_text(model: nn.Module, preprocessing: Preprocessing) -> str | None:
    """FLOPs for one image, as a metadata entry; None if unknown."""
    count = flops_per_image(model, preprocessing.height, preprocessing.width)
    return None if count is None else str(count)


def flops_per_image(model: nn.Module, height: int, width: int | None = None) -> int | None:
    """Floating-point operations of matrix products, convolutions and attention for one image.

    A multiplication and an addition count as two operations. ViT-B/16 at 224 pixels takes 35.1e9.

    Args:
        model: A plain model that takes normalised images. It runs on fake tensors only.
        height: Height of the input in pixels.
        width: Width in pixels; None means the height.

    Returns:
        The count. None if the model cannot run on fake tensors, or uses an operator that may
        multiply matrices and is not in ``COUNTS``.
    """
    counter = _Counter()
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), _unfused(), counter:
            model(torch.zeros(1, 3, height, width or height, dtype=like.dtype, device=like.device))
    except Exception:  # fake tensors raise many different exception classes
        return None
    return None if counter.unknown else counter.total or None


def _products(left: Tensor, out: Tensor) -> int:
    """FLOPs of a product that sums over the last axis of its left factor."""
    return 2 * out.numel() * left.shape[-1]


def _convolution(image: Tensor, weight: Tensor, out: Tensor, transposed: bool) -> int:
    """FLOPs of a convolution: a filter per output element, or per input element if transposed."""
    return 2 * (image if transposed else out).numel() * weight[0].numel()


COUNTS: dict[str, Callable[[Any, Tensor], int]] = {
    "mm": lambda a, out: _products(a[0], out),
    "bmm": lambda a, out: _products(a[0], out),
    "mv": lambda a, out: _products(a[0], out),
    "dot": lambda a, out: _products(a[0], out),
    "linear": lambda a, out: _products(a[0], out),
    "addmm": lambda a, out: _products(a[1], out),
    "baddbmm": lambda a, out: _products(a[1], out),
    "addmv": lambda a, out: _products(a[1], out),
    "convolution": lambda a, out: _convolution(a[0], a[1], out, a[6]),
}
"""FLOPs of PyTorch's core operators that multiply matrices, from their arguments and output."""


@contextmanager
def _unfused() -> Iterator[None]:
    """Context manager: run attention as two products, and encoder layers without the fast path."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums the FLOPs of all known products, and collects the names of unknown ones."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total, self.unknown = 0, set[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        library, _, name = func._schema.name.partition("::")
        counted = library == "aten" and name in COUNTS
        if library == "aten" and not counted:
            with self:  # inference_mode does not decompose composite operators
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if counted:
            self.total += COUNTS[name](args, out)
        elif library not in ("aten", "prim") or PRODUCT.search(name):
            self.unknown.add(f"{library}::{name}")
        return out
