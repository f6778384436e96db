"""Create timm models with a custom loader in place of timm's own.

A model's entry point defines the filter for other libraries' names, and some entry points build a
different model when it is to be pre-trained (FBNet's epsilon). So the model is created as a
pre-trained one, and timm's loader is replaced during this one call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models import _builder
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["Filter", "Loader", "TimmLoading", "create_filled", "create_with_loader", "skeleton"]

Filter = Callable[..., Mapping[str, Any]] | None
"""timm's conversion of a file's tensors to its own names: (tensors, model) to tensors."""


@dataclass(frozen=True)
class TimmLoading:
    """How timm would fill a model with its own weights.

    Attributes:
        convert: Filter of the model's entry point.
        strict: Whether timm's weights fill the model exactly; FCMAE's lack the last norm.
        load: Fetches timm's weights and fills the model.
    """

    convert: Filter
    strict: bool
    load: Callable[[], None]


Loader = Callable[[nn.Module, TimmLoading], None]
"""Fills a newly created model with weights."""

Names = Callable[[nn.Module], Collection[str]]
"""Names of some of a model's parameters."""

_LOCK = threading.RLock()


RANDOM = frozenset(
    "uniform_ normal_ trunc_normal_ kaiming_uniform_ kaiming_normal_ xavier_uniform_ "
    "xavier_normal_".split()
)
"""Methods of tensors and functions of ``torch.nn.init`` that draw the values of a tensor."""


class _Blank(TorchFunctionMode):
    """Initial values are not drawn: NaN stands for them, so what stays without a value is found."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in RANDOM or name == "erfinv_":  # trunc_normal_ of timm calls uniform_, then this
            tensor = args[0] if args else kwargs["tensor"]
            with torch.no_grad():
                return tensor.fill_(torch.nan) if name in RANDOM else tensor
        return func(*args, **kwargs)


def create_filled(name: str, loader: Loader, leave_out: Names, **args: Any) -> nn.Module:
    """As ``create_with_loader``, without drawing initial values that ``loader`` replaces.

    They take a third of the time. If the loader leaves one of them, the model is created again.

    Args:
        name: As for ``create_with_loader``.
        loader: As for ``create_with_loader``; it may be called twice.
        leave_out: Names of the parameters that the caller fills: they may have no values.
        args: As for ``create_with_loader``.
    """
    with _Blank():
        model = create_with_loader(name, loader, **args)
    later = leave_out(model)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if all(n in later or not t.sum().isnan() or not t.isnan().any() for n, t in tensors):
        return model
    return create_with_loader(name, loader, **args)


def create_with_loader(name: str, loader: Loader, **args: Any) -> nn.Module:
    """A timm model that ``loader`` fills at the moment when timm would load its weights.

    A user's model may load its weights in another way, or have none: it is filled afterwards.

    Args:
        name: timm name, with or without a tag.
        loader: Fills the model, or leaves its initial values.
        args: Arguments of ``timm.create_model``.
    """
    filled = False

    def fill(model: nn.Module, timm_loading: TimmLoading) -> None:
        nonlocal filled
        filled = True
        loader(model, timm_loading)

    with _replaced(fill):
        model: nn.Module = timm.create_model(name, pretrained=True, **args)
    if not filled:
        loader(model, TimmLoading(None, True, lambda: None))
    return model


def skeleton(name: str, **args: Any) -> nn.Module:
    """A timm model on the meta device, without memory for its weights.

    A model that timm cannot create there keeps its initial weights on the CPU.
    """

    def load_nothing(model: nn.Module, timm_loading: TimmLoading) -> None:
        """Leave the initial values."""

    try:
        with torch.device("meta"):
            return create_with_loader(name, load_nothing, **args)
    except (NotImplementedError, RuntimeError):
        return create_with_loader(name, load_nothing, **args)


@contextmanager
def _replaced(loader: Loader) -> Iterator[None]:
    """Replace timm's loader, for this thread only."""
    thread = threading.get_ident()

    with _LOCK:
        own: Any = _builder.load_pretrained

        def load_pretrained(model: nn.Module, *args: Any, **kwargs: Any) -> None:
            if threading.get_ident() != thread:
                own(model, *args, **kwargs)
                return
            strict = kwargs.get("strict", True)
            convert = kwargs.get("filter_fn")
            loader(model, TimmLoading(convert, strict, lambda: own(model, *args, **kwargs)))

        _builder.load_pretrained = load_pretrained
        try:
            yield
        finally:
            _builder.load_pretrained = own
