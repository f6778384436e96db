"""How much arithmetic a model takes, for the share of a machine's limit.

The products are counted one by one as the model runs without numbers. Attention is run as the two
products that its definition has, so that the count does not depend on which kernels PyTorch has for
it, on the version, or on whether timm fuses it.
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
"""In the name of an operator: it multiplies matrices, whether or not it is counted below."""


def flops_text(model: nn.Module, preprocessing: Preprocessing) -> str | None:
    """The arithmetic of an image as metadata; None where it is not known."""
    count = flops_per_image(model, preprocessing.height, preprocessing.width)
    return None if count is None else str(count)


def flops_per_image(model: nn.Module, height: int, width: int | None = None) -> int | None:
    """Floating point operations of matrix products, convolutions and attention for one image.

    A multiplication and an addition count as two. ViT-B/16 at 224 pixels takes 35.1e9.

    Args:
        model: A plain model of normalised images; nothing is computed with it.
        height: Of the input, in pixels.
        width: Likewise; None is the height.

    Returns:
        None where the model cannot be gone through without numbers, or runs an operator that may
        multiply matrices and whose arithmetic is not known here.
    """
    counter = _Counter()
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), _written_out(), counter:
            model(torch.zeros(1, 3, height, width or height, dtype=like.dtype, device=like.device))
    except Exception:  # fake tensors raise classes of their own, of many kinds
        return None
    return None if counter.unknown else counter.total or None


def _products(left: Tensor, out: Tensor) -> int:
    """Of a product whose sums run over the last axis of its left factor."""
    return 2 * out.numel() * left.shape[-1]


def _convolution(image: Tensor, weight: Tensor, out: Tensor, transposed: bool) -> int:
    """Every place of the output is a sum over a filter; transposed, every place of the input."""
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
"""PyTorch's basic operators that multiply matrices, by name: from arguments and output to FLOPs."""


@contextmanager
def _written_out() -> Iterator[None]:
    """Attention runs as its two products, and encoder layers run layer by layer."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums the arithmetic of all products, and keeps the names of those it does not know."""

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
            with self:  # composite operators come whole under inference_mode
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if counted:
            self.total += COUNTS[name](args, out)
        elif library not in ("aten", "prim") or PRODUCT.search(name):
            self.unknown.add(f"{library}::{name}")
        return out
