"""Gradients, optimiser steps and evaluation, on one device or several."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import DivergedError
from aoft_deploy.float32_products import float32_products
from aoft_deploy.training.augmentation import DEPTH, MIX, generator, mix, reseed
from aoft_deploy.training.batches import Loader, Part
from aoft_deploy.training.model import only_depth_is_random
from aoft_deploy.training.optimisation import make_optimiser, set_rate
from aoft_deploy.training.precision import precision_on
from aoft_deploy.training.settings import TrainingSettings
from aoft_deploy.tuning.tuned_model import TunedModel

__all__ = ["Learner", "diverged", "normalised"]

CHECK_EVERY = 20  # steps between checks of the gradient, each of which waits for the GPU


class Learner:
    """A tuned model with its optimiser and devices.

    Attributes:
        tuned: The model.
        optimiser: AdamW over its trained parameters.
        precision: ``fp32``, ``tf32`` or ``bf16``.

    Args:
        accelerator: Manages the devices and exchanges gradients between them.
        tuned: The model.
        preprocessing: Gives the normalisation of pixels.
        settings: The hyper-parameters.
        steps: Optimiser steps of an epoch.

    Raises:
        SettingError: The device does not compute in the precision.
    """

    def __init__(
        self,
        accelerator: Any,
        tuned: TunedModel,
        preprocessing: Preprocessing,
        settings: TrainingSettings,
        steps: int,
    ) -> None:
        self.accelerator, self.tuned = accelerator, tuned
        self.settings, self.steps = settings, steps
        self.device: torch.device = accelerator.device
        self.model: nn.Module = accelerator.prepare_model(tuned)
        self.optimiser = make_optimiser(tuned, settings)
        dtype = next(tuned.parameters()).dtype
        self.pixel_mean, self.pixel_std = (
            torch.tensor(triple, dtype=dtype, device=self.device).view(3, 1, 1)
            for triple in (preprocessing.mean, preprocessing.std)
        )
        self.precision = precision_on(self.device, settings.precision)

    def fit(
        self, loader: Loader, epoch: int, tick: Callable[[int, Callable[[], str]], object]
    ) -> tuple[float, float, float]:
        """Train one epoch.

        Args:
            loader: Gives the parts of this process.
            epoch: The epoch, from 0.
            tick: Called after each step with the step, from 0, and a function that returns the mean
                loss so far, as text.

        Returns:
            Last learning rate, mean loss, accuracy.

        Raises:
            DivergedError: The gradient is not finite.
        """
        only_depth_is_random(self.tuned)
        sums, count = torch.zeros(2, device=self.device), 0
        rate, parts = 0.0, self.settings.accumulate

        def loss() -> str:  # waits for the GPU
            return f"loss {sums[0].item() / count:.4f}"

        for i, (part, pixels, labels) in enumerate(loader.epoch(epoch)):
            is_last = (i + 1) % parts == 0
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                sums += self._backward(part, pixels, labels)
            count += len(labels) if part.weight > 0 else 0
            if is_last:
                rate = self._step(epoch, part.step)
                tick(part.step, loss)
        return rate, *self._means(sums, count)

    def _backward(self, part: Part, pixels: Tensor, labels: Tensor) -> Tensor:
        """Add the gradients of a part; return its sums for ``_means``.

        Nothing here waits for the GPU, which computes while the next part is loaded.
        """
        place = part.epoch, part.step, part.number
        settings = self.settings
        images, labels = self._prepared(pixels), self._on_device(labels)
        rng = generator(settings.seed, MIX, *place)
        images, share = mix(images, settings.mixup, settings.cutmix, rng)
        reseed(settings.seed, DEPTH, *place)
        losses = partial(
            F.cross_entropy, reduction="none", label_smoothing=settings.label_smoothing
        )
        with float32_products(tf32=self.precision == "tf32"):
            logits = self._logits(self.model, images)
            loss = share * losses(logits, labels)
            if share < 1:
                loss = loss + (1 - share) * losses(logits, labels.flip(0))
            # Processes average their gradients, but the loss is a mean over the images of all.
            (loss.sum() * part.weight * self.accelerator.num_processes).backward()
        return _sums(loss.detach(), logits, labels) * (part.weight > 0)

    def _step(self, epoch: int, step: int) -> float:
        """Update the trained parameters; return the learning rate."""
        settings, done = self.settings, epoch * self.steps + step
        trained = list(self.tuned.trained().values())
        norm = nn.utils.clip_grad_norm_(trained, settings.clip_norm or math.inf)
        is_checked = step % CHECK_EVERY == 0 or step + 1 == self.steps
        if is_checked and not norm.isfinite():
            raise diverged(epoch, settings)
        rate = set_rate(
            self.optimiser,
            done,
            floor=settings.min_lr,
            warmup=round(settings.warmup_epochs * self.steps),
            total=settings.epochs * self.steps,
        )
        self.optimiser.step()
        self.optimiser.zero_grad()
        return rate

    def has_constant_features(self, augment: str) -> bool:
        """Whether the input of the classifier is the same in every epoch.

        Nothing but the classifier is trained then. Several processes exchange gradients through the
        whole model, so they compute it.

        Args:
            augment: Augmentation of the images.
        """
        settings = self.settings
        random = settings.mixup or settings.cutmix or settings.drop_path or augment != "none"
        frozen = not self.tuned.updates and self.tuned.direct == self.tuned.classifier
        return frozen and not random and self.accelerator.num_processes == 1

    @torch.no_grad()
    def features(self, loader: Loader, tick: Callable[[int], object]) -> Tensor | None:
        """Input of the classifier for all images of a loader, (images, width).

        Args:
            loader: Gives all images in their order.
            tick: Called after each part with the number of its images.

        Returns:
            None if the classifier of these features does not give the model's logits, bit for bit.
        """
        self.tuned.eval()
        found: list[Tensor] = []
        backbone: Any = self.tuned.backbone
        with float32_products(tf32=self.precision == "tf32"):
            for _, pixels, _ in loader.epoch(0):
                images = self._prepared(pixels)
                with self._autocast():
                    tokens = backbone.forward_features(images)
                    found.append(backbone.forward_head(tokens, pre_logits=True))
                if len(found) == 1:
                    logits = self._logits(self.tuned, images)
                    if found[0].dim() != 2 or not logits.equal(self._logits(self.tuned, found[0])):
                        return None
                tick(len(pixels))
        return torch.cat(found)

    @torch.no_grad()
    def evaluate(self, loader: Loader, tick: Callable[[int], object]) -> tuple[float, float]:
        """Mean loss and accuracy over all images of a loader.

        Args:
            loader: Gives the parts of this process.
            tick: Called after each part with the number of its images.
        """
        self.tuned.eval()
        sums, count = torch.zeros(2, device=self.device), 0
        for _, pixels, labels in loader.epoch(0):
            labels = self._on_device(labels)
            with float32_products(tf32=self.precision == "tf32"):
                logits = self._logits(self.tuned, self._prepared(pixels))
            sums += _sums(F.cross_entropy(logits, labels, reduction="none"), logits, labels)
            count += len(labels)
            tick(len(labels))
        return self._means(sums, count)

    def _means(self, sums: Tensor, count: int) -> tuple[float, float]:
        """Mean loss and accuracy, from the sums and the numbers of images of all processes."""
        total = torch.tensor([count], device=self.device)
        (loss, right), (images,) = (
            self.accelerator.reduce(each, "sum").tolist() for each in (sums, total)
        )
        return loss / images, right / images

    def _on_device(self, batch: Tensor) -> Tensor:
        """Copy a batch to the device; from page-locked memory, without waiting for it."""
        return batch.to(self.device, non_blocking=True)

    def _prepared(self, pixels: Tensor) -> Tensor:
        if pixels.dim() == 2:
            return pixels  # features
        return normalised(self._on_device(pixels), self.pixel_mean, self.pixel_std)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """Logits of images, or of features (batch, width)."""
        if images.dim() == 2:
            model = self.tuned.backbone.get_classifier()  # type: ignore[operator]
        with self._autocast():
            logits: Tensor = model(images)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _sums(losses: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of losses and number of correct answers: shape (2,)."""
    return torch.stack([losses.sum(), (logits.argmax(-1) == labels).sum()])


def diverged(epoch: int, settings: TrainingSettings) -> DivergedError:
    """The error for an epoch, from 0, with a loss or gradient that is not finite."""
    rates = " and ".join(f"{rate:g}" for rate in settings.peak_rates())
    return DivergedError(
        f"Training diverged in epoch {epoch + 1}: its loss or gradient is not finite; use lower "
        f"learning rates than {rates} (`lr`, `head_lr`)."
    )


def normalised(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalise pixels; in float32 bit-identical to ``Preprocessing``.

    Args:
        pixels: (…, 3, height, width), uint8.
        mean: (3, 1, 1); its dtype is used for the computation.
        std: (3, 1, 1).
    """
    return (pixels.to(mean.dtype) / 255 - mean) / std
