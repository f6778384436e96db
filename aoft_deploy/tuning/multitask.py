"""One backbone that answers every sample of a batch with that sample's own task.

A task is a row of numbers: its updates' parameters, in an order that ``Layout`` fixes. The rows of
all tasks are a *bank*; a batch gathers its samples' rows, every formula is called once for all
samples and all sites that are alike, and each layer adds its samples' deltas to what the shared
weight gives (``mix``). Classifiers of any width stand in a second bank, one row for each class.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn
from torch.nn.utils import parametrize

from aoft_deploy.errors import AttachError
from aoft_deploy.tuning.prompted_blocks import Prompted
from aoft_deploy.tuning.task_layout import Layout
from aoft_deploy.tuning.tuned_model import TunedModel, UpdatedModule
from aoft_deploy.tuning.updates.delta import Rows
from aoft_deploy.tuning.updates.mixing import mix_linear

__all__ = ["FleetModel", "FoldedModel", "MixedModel"]


class Batch:
    """The deltas of the batch that is under way, and which of them were asked for."""

    def __init__(self) -> None:
        self.deltas: dict[str, Any] = {}
        self.used: set[str] = set()

    def take(self, site: str) -> Any:
        self.used.add(site)
        return self.deltas[site]


class Mixed(nn.Module):
    """Mixed into a layer's class: what the layer gives, changed for each sample by its own task."""

    batch: Batch
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


class MixedPrompts(nn.Module):
    """Prompts of each sample's own task.

    Args:
        batch: Holds the deltas.
        site: The block.
    """

    def __init__(self, batch: Batch, site: str) -> None:
        super().__init__()
        self.batch, self.site = batch, site

    def delta(self) -> Any:
        """The prompts, (batch, prompts, width)."""
        return self.batch.take(self.site)


@functools.cache
def _mixed_class(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"Mixed{cls.__name__}", (Mixed, cls), {"__module__": __name__})


class FleetModel(nn.Module):
    """A backbone that answers with the tasks of a bank, made from one tuned model.

    Attributes:
        layout: Order of a task's numbers.
        width: Width of the features that classifiers take.

    Args:
        tuned: A model of the method, settings and backbone that all tasks share; it is taken over.

    Raises:
        AttachError: The model cannot serve several tasks, with the reason.
    """

    def __init__(self, tuned: TunedModel) -> None:
        super().__init__()
        _check(tuned)
        self.backbone, self.layout, self._batch = tuned.backbone, Layout(tuned.updates), Batch()
        names: dict[Any, str] = {update: site for site, update in tuned.updates.items()}
        for path, module in list(self.backbone.named_modules()):
            self.place(path, module, names)
        self.width = self.backbone.get_parameter(tuned.classifier[0]).shape[1]
        self.backbone.reset_classifier(0)  # type: ignore[operator]
        self.requires_grad_(False).eval()

    def place(self, path: str, module: nn.Module, names: Mapping[Any, str]) -> None:
        """Make a module of the backbone take its deltas from the batch, if it has updates."""
        raise NotImplementedError

    def rows(self, bank: Tensor, task: Tensor) -> Tensor:
        """The numbers that a batch needs, (samples, numbers)."""
        raise NotImplementedError

    def forward(
        self,
        pixel_values: Tensor,
        task: Tensor,
        bank: Tensor,
        heads: Tensor,
        first: Tensor,
        count: Tensor,
        columns: Tensor,
    ) -> Tensor:
        """Each sample's logits by its own task.

        Args:
            pixel_values: (batch, 3, H, W).
            task: Row of the bank for each sample, int64 (batch,).
            bank: Updates of all tasks, (tasks, numbers).
            heads: Classifier rows of all tasks, weight and bias, (rows, width + 1).
            first: First row of each task's classifier, int64 (tasks,).
            count: Number of its classes, int64 (tasks,).
            columns: 0, 1, … up to the widest classifier, int64 (classes,).

        Returns:
            (batch, classes); −inf beyond a task's own classes.
        """
        deltas = self.layout.deltas(self.rows(bank, task))
        self._batch.deltas, self._batch.used = deltas, set()
        body: Any = self.backbone
        features = body.forward_head(body.forward_features(pixel_values), pre_logits=True)
        self._check_used()
        own = columns < count[task][:, None]
        rows = torch.where(own, first[task][:, None] + columns, 0)
        chosen = heads[rows]
        logits = (chosen[..., :-1] @ features[..., None])[..., 0] + chosen[..., -1]
        return torch.where(own, logits, float("-inf"))

    @torch.no_grad()
    def try_out(self, size: int) -> None:
        """Answer one image of zeros, ``size`` pixels wide.

        Raises:
            AttachError: A site cannot take part, which only a forward shows.
        """
        zero = torch.zeros(1, dtype=torch.int64)
        weight = next(self.backbone.parameters())
        heads = weight.new_zeros(1, self.width + 1)
        bank = weight.new_zeros(1, self.layout.numbers)
        self(weight.new_zeros(1, 3, size, size), zero, bank, heads, zero, zero + 1, zero)

    def _check_used(self) -> None:
        """Every site must have been asked for its delta, or tasks would be mixed up silently."""
        missed = sorted(set(self._batch.deltas) - self._batch.used)
        self._batch.deltas = {}
        if missed:
            raise AttachError(
                f"{missed[0]} is read by its parent instead of called, so samples of one batch "
                "cannot have different updates there: export each task by itself."
            )


class MixedModel(FleetModel):
    """A backbone for mixed batches: every sample with its own task's deltas, added as it goes.

    Raises:
        AttachError: Samples cannot differ at some site, with the reason.
    """

    def __init__(self, tuned: TunedModel) -> None:
        _check_mixing(tuned)
        super().__init__(tuned)

    def place(self, path: str, module: nn.Module, names: Mapping[Any, str]) -> None:
        """Mix a class of ours into a layer's, or give prompts for every sample."""
        if isinstance(module, UpdatedModule):
            pairs = zip(module.rows, module.updates, strict=True)
            layer = module.base
            layer.__class__ = _mixed_class(type(layer))  # type: ignore[arg-type]
            places = [(rows, names[update]) for rows, update in pairs]
            layer.__dict__.update(batch=self._batch, places=places)
            self.backbone.set_submodule(path, layer)
        elif isinstance(module, Prompted) and "prompts" in module._modules:
            site = names[module.get_submodule("prompts")]
            module.add_module("prompts", MixedPrompts(self._batch, site))

    def rows(self, bank: Tensor, task: Tensor) -> Tensor:
        """Each sample's own row."""
        return bank[task]


class FoldedModel(FleetModel):
    """A backbone for batches of one task, whose numbers it folds into its weights each time.

    Costs a pass over the weights that updates touch, whatever the batch; every method and layer
    can do it. All samples are answered by the first one's task, so ``task`` must not differ.
    """

    def place(self, path: str, module: nn.Module, names: Mapping[Any, str]) -> None:
        """Put the batch's deltas in the place of the module's updates."""
        for name, child in list(module.named_children()):
            if child in names:
                module.add_module(name, _BatchUpdate(self._batch, names[child]))

    def rows(self, bank: Tensor, task: Tensor) -> Tensor:
        """The first sample's row, (1, numbers)."""
        return bank[task[:1]]


class _BatchUpdate(nn.Module):
    """An update whose numbers are those of the batch's one task.

    Args:
        batch: Holds the deltas.
        site: The update's.
    """

    def __init__(self, batch: Batch, site: str) -> None:
        super().__init__()
        self.batch, self.site = batch, site

    def delta(self) -> Any:
        """The delta of the task."""
        return self.batch.take(self.site)[0]


def _check(tuned: TunedModel) -> None:
    """Refuse what shares no backbone or has no plain classifier."""
    name = type(tuned.backbone).__name__
    if tuned.direct != tuned.classifier:
        raise AttachError(f"{tuned.method} changes every weight: its tasks share no backbone.")
    shapes = [tuned.backbone.get_parameter(n).dim() for n in tuned.classifier]
    if shapes not in ([2], [2, 1]):
        raise AttachError(f"{name} has no single linear classifier: its tasks cannot be mixed.")


def _check_mixing(tuned: TunedModel) -> None:
    """Refuse what cannot differ within a batch."""
    for path, module in tuned.backbone.named_modules():
        if parametrize.is_parametrized(module):
            raise AttachError(
                f"{path} holds biases outside its linear map, which cannot differ within a batch."
            )
        if isinstance(module, UpdatedModule) and isinstance(module.base, nn.Conv2d):
            if any(type(delta).__name__ == "WeightDelta" for _, delta in module.deltas()):
                raise AttachError(
                    f"{path} is a convolution, whose weight cannot differ in a batch."
                )
