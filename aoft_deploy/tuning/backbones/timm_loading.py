"""The moment at which timm would load a model's weights, taken over.

Only the entry point of a model knows the filter for foreign names, and some entry points make
another model where weights are to come (FBNet's epsilon). So a model is made as timm makes it with
its own weights, and timm's loader is replaced for this one call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models import _builder
from torch import nn

__all__ = ["Filter", "Load", "Usual", "made", "skeleton"]

Filter = Callable[..., Mapping[str, Any]] | None
"""What timm gives a file's tensors to: (tensors, model) to tensors by timm's names."""


@dataclass(frozen=True)
class Usual:
    """How timm would fill a model.

    Attributes:
        convert: Filter of the model's entry point.
        strict: Whether its weights fill the model just so; FCMAE's lack the last norm.
        load: Fetches timm's own weights and fills the model.
    """

    convert: Filter
    strict: bool
    load: Callable[[], None]


Load = Callable[[nn.Module, Usual], None]
"""Fills a model."""

_LOCK = threading.RLock()


def made(name: str, load: Load, **args: Any) -> nn.Module:
    """A timm model, filled by ``load`` where timm would load its pre-trained weights.

    Args:
        name: timm name, with or without a tag.
        load: Fills the model, or leaves it as it starts.
        args: Arguments of ``timm.create_model``.
    """
    with _replaced(load):
        model: nn.Module = timm.create_model(name, pretrained=True, **args)
    return model


def skeleton(name: str, **args: Any) -> nn.Module:
    """A timm model without memory for its weights; as ``made`` where timm cannot do without."""

    def leave(model: nn.Module, usual: Usual) -> None:
        """Load nothing."""

    try:
        with torch.device("meta"):
            return made(name, leave, **args)
    except (NotImplementedError, RuntimeError):
        return made(name, leave, **args)


@contextmanager
def _replaced(load: Load) -> Iterator[None]:
    """Put ``load`` in the place of timm's loader, for this thread."""
    thread = threading.get_ident()

    with _LOCK:
        own: Any = _builder.load_pretrained

        def loader(model: nn.Module, *args: Any, **kwargs: Any) -> None:
            if threading.get_ident() != thread:
                own(model, *args, **kwargs)
                return
            strict = kwargs.get("strict", True)
            usual = Usual(kwargs.get("filter_fn"), strict, lambda: own(model, *args, **kwargs))
            load(model, usual)

        _builder.load_pretrained = loader
        try:
            yield
        finally:
            _builder.load_pretrained = own
