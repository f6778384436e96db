"""Multi-task models: one backbone that computes every sample of a batch with its own task.

A task is a row of parameters, those of its updates in the order of a ``Layout``. The rows of all
tasks form a *bank*. A batch gathers the rows of its samples and calls every formula once for all
samples and all sites of equal kind. Each layer then adds its samples' deltas to the output of the
shared weight (``mix``). The classifiers of all tasks form a second bank with one row per class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from aoft_deploy.errors import AttachError
from aoft_deploy.tuning.mixed_layers import BatchDeltas, BatchUpdate, mix_layer
from aoft_deploy.tuning.prompted_blocks import Prompted
from aoft_deploy.tuning.task_layout import Layout
from aoft_deploy.tuning.tuned_model import TunedModel
from aoft_deploy.tuning.updated_layers import UpdatedModule
from aoft_deploy.tuning.updates.delta import WeightDelta

__all__ = ["FleetModel", "FoldedModel", "MixedModel"]


class FleetModel(nn.Module):
    """Base of the multi-task models: a backbone whose updates come from a bank.

    Attributes:
        layout: Order of a task's parameters in a row.
        width: Width of the features, the input of the classifiers.
        batch_deltas: The deltas of the current batch.

    Args:
        tuned: A model with the method, settings and backbone of all tasks. It becomes part of this
            model and cannot be used afterwards.

    Raises:
        AttachError: The model cannot serve several tasks, with the reason.
    """

    def __init__(self, tuned: TunedModel) -> None:
        super().__init__()
        _check(tuned)
        self.backbone = tuned.backbone
        self.layout = Layout(tuned.updates)
        self.batch_deltas = BatchDeltas()
        names: dict[Any, str] = {update: site for site, update in tuned.updates.items()}
        for path, module in list(self.backbone.named_modules()):
            self.place(path, module, names)
        self.width = self.backbone.get_parameter(tuned.classifier[0]).shape[1]
        self.backbone.reset_classifier(0)  # type: ignore[operator]
        self.requires_grad_(False).eval()

    def place(self, path: str, module: nn.Module, names: Mapping[Any, str]) -> None:
        """Make a module of the backbone use the batch's deltas, if it has updates."""
        raise NotImplementedError

    def rows(self, bank: Tensor, task: Tensor) -> Tensor:
        """The rows of the bank that a batch needs, (samples, row_length)."""
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
        """The logits of every sample, by its own task.

        Args:
            pixel_values: (batch, 3, H, W).
            task: Row of the bank for each sample, int64 (batch,).
            bank: Parameters of all tasks, (tasks, row_length).
            heads: Classifier rows of all tasks, weight and bias, (rows, width + 1).
            first: First row of each task's classifier, int64 (tasks,).
            count: Number of each task's classes, int64 (tasks,).
            columns: 0, 1, … up to the largest number of classes, int64 (classes,).

        Returns:
            (batch, classes); −inf beyond a task's own classes.
        """
        body: Any = self.backbone
        with self.batch_deltas.given(self.layout.deltas(self.rows(bank, task))):
            features = body.forward_head(body.forward_features(pixel_values), pre_logits=True)
        valid = columns < count[task][:, None]
        rows = torch.where(valid, first[task][:, None] + columns, 0)
        head = heads[rows]
        logits = (head[..., :-1] @ features[..., None])[..., 0] + head[..., -1]
        return torch.where(valid, logits, float("-inf"))

    @torch.no_grad()
    def try_out(self, height: int, width: int) -> None:
        """Compute one image of zeros, of this size in pixels, to find unsupported sites.

        Raises:
            AttachError: The forward does not use the delta of some site.
        """
        zero = torch.zeros(1, dtype=torch.int64)
        weight = next(self.backbone.parameters())
        heads = weight.new_zeros(1, self.width + 1)
        bank = weight.new_zeros(1, self.layout.row_length)
        self(weight.new_zeros(1, 3, height, width), zero, bank, heads, zero, zero + 1, zero)


class MixedModel(FleetModel):
    """A backbone for mixed batches: every layer adds each sample's own deltas.

    Raises:
        AttachError: Samples cannot have different deltas at some site, with the reason.
    """

    def __init__(self, tuned: TunedModel) -> None:
        _check_mixing(tuned)
        super().__init__(tuned)

    def place(self, path: str, module: nn.Module, names: Mapping[Any, str]) -> None:
        """Make a layer mix its deltas, or replace prompts with those of every sample."""
        if isinstance(module, UpdatedModule):
            pairs = zip(module.rows, module.updates, strict=True)
            places = [(rows, names[update]) for rows, update in pairs]
            mix_layer(module.base, self.batch_deltas, places)
            self.backbone.set_submodule(path, module.base)
        elif isinstance(module, Prompted) and "prompts" in module._modules:
            site = names[module.get_submodule("prompts")]
            module.add_module("prompts", BatchUpdate(self.batch_deltas, site, single_task=False))

    def rows(self, bank: Tensor, task: Tensor) -> Tensor:
        """Each sample's own row."""
        return bank[task]


class FoldedModel(FleetModel):
    """A backbone for batches of a single task, which it folds into its weights for every batch.

    This costs one pass over the weights with updates, for any batch size, and works for every
    method and layer. The first sample's task is used for all samples, so all must have the same.
    """

    def place(self, path: str, module: nn.Module, names: Mapping[Any, str]) -> None:
        """Replace the module's updates with the batch's deltas."""
        for name, child in list(module.named_children()):
            if child in names:
                module.add_module(
                    name, BatchUpdate(self.batch_deltas, names[child], single_task=True)
                )

    def rows(self, bank: Tensor, task: Tensor) -> Tensor:
        """The first sample's row, (1, row_length)."""
        return bank[task[:1]]


def _check(tuned: TunedModel) -> None:
    """Refuse a method without a shared backbone and a model without a linear classifier."""
    name = type(tuned.backbone).__name__
    if tuned.direct != tuned.classifier:
        raise AttachError(f"{tuned.method} changes every weight, so its tasks share no backbone.")
    shapes = [tuned.backbone.get_parameter(n).dim() for n in tuned.classifier]
    if shapes not in ([2], [2, 1]):
        raise AttachError(f"{name} has no single linear classifier, so its tasks cannot be mixed.")


def _check_mixing(tuned: TunedModel) -> None:
    """Refuse layers whose deltas cannot differ within a batch."""
    for path, module in tuned.backbone.named_modules():
        if parametrize.is_parametrized(module):
            raise AttachError(
                f"{path} has biases outside its linear map, which cannot differ within a batch."
            )
        if isinstance(module, UpdatedModule) and isinstance(module.base, nn.Conv2d):
            if any(isinstance(delta, WeightDelta) for _, delta in module.deltas()):
                raise AttachError(
                    f"{path} is a convolution, whose weight cannot differ within a batch."
                )
