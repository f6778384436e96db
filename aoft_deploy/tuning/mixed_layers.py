"""Layers and updates whose deltas come from the current batch of a multi-task model."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from aoft_deploy.errors import AttachError
from aoft_deploy.tuning.updates.delta import Rows
from aoft_deploy.tuning.updates.mixing import mix_linear

__all__ = ["BatchDeltas", "BatchUpdate", "mix_layer"]


class BatchDeltas:
    """The deltas of the current batch, and the sites that used them."""

    def __init__(self) -> None:
        self.deltas: dict[str, Any] = {}
        self.used: set[str] = set()

    def take(self, site: str) -> Any:
        """The delta of a site, which is recorded as used."""
        self.used.add(site)
        return self.deltas[site]

    def of(self, block: nn.Module) -> dict[str, Any]:
        """The deltas of all sites in a block, which are recorded as used."""
        return {site: self.take(site) for site in _sites(block)}

    @contextmanager
    def given(self, deltas: Mapping[str, Any]) -> Iterator[None]:
        """Context manager: compute with these deltas.

        Raises:
            AttachError: The computation did not use the delta of some site. Its results would
                belong to no task.
        """
        self.deltas, self.used = dict(deltas), set()
        try:
            yield
            unused = sorted(set(self.deltas) - self.used)
        finally:
            self.deltas = {}
        if unused:
            raise AttachError(
                f"{unused[0]} is read by its parent instead of called, so samples of one batch "
                "cannot have different updates there: export each task separately."
            )


class BatchUpdate(nn.Module):
    """Replaces an update: its delta comes from the batch.

    Args:
        batch: Contains the deltas.
        site: Name of the update's site.
        single_task: Whether the delta is that of the first sample, without the axis ``batch``.
    """

    def __init__(self, batch: BatchDeltas, site: str, single_task: bool) -> None:
        super().__init__()
        self.batch, self.site, self.single_task = batch, site, single_task

    def delta(self) -> Any:
        """The delta of every sample, or of the single task."""
        delta = self.batch.take(self.site)
        return delta[0] if self.single_task else delta


class _MixedLayer(nn.Module):
    """Mixin for a layer's class: changes the output of every sample by its own delta."""

    batch: BatchDeltas
    places: list[tuple[Rows, str]]

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output for x, (batch, …)."""
        deltas = [(rows, self.batch.take(site)) for rows, site in self.places]
        samples = deltas[0][1].samples()
        if isinstance(self, nn.Linear):
            tokens = x.reshape(samples, -1, x.shape[-1])
            changed = mix_linear(tokens, self.weight, self.bias, deltas)
            return changed.reshape(*x.shape[:-1], changed.shape[-1])
        y: Tensor = super().forward(x)
        channels_first = isinstance(self, (nn.Conv2d, nn.BatchNorm2d, LayerNorm2d))
        if channels_first:
            y = y.movedim(1, -1)
        flat = y.reshape(samples, -1, y.shape[-1])
        mixed: Tensor = deltas[0][1].mix(flat, flat, flat)
        mixed = mixed.reshape(y.shape)
        return mixed.movedim(-1, 1) if channels_first else mixed


def _sites(block: nn.Module) -> list[str]:
    """Names of the sites whose deltas the modules of a block take."""
    sites = list[str]()
    for module in block.modules():
        if isinstance(module, BatchUpdate):
            sites.append(module.site)
        elif isinstance(module, _MixedLayer):
            sites += [site for _, site in module.places]
    return sites


def mix_layer(layer: nn.Module, batch: BatchDeltas, places: list[tuple[Rows, str]]) -> None:
    """Make a layer add the batch's deltas to its output.

    Args:
        layer: The layer, whose class is changed in place.
        batch: Contains the deltas.
        places: Row ranges of the layer, and the name of the site of each.
    """
    layer.__class__ = _mixed_class(type(layer))  # type: ignore[arg-type]
    layer.__dict__.update(batch=batch, places=places)


@functools.cache
def _mixed_class(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"Mixed{cls.__name__}", (_MixedLayer, cls), {"__module__": __name__})
