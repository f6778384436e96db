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
from aoft_deploy.training.augmentation import DEPTH, MIX, generator, mix, reseed
from aoft_deploy.training.batches import Loader, Part
from aoft_deploy.training.model import only_depth_is_random
from aoft_deploy.training.optimisation import make_optimiser, set_rate
from aoft_deploy.training.settings import TrainingSettings
from aoft_deploy.tuning.tuned_model import TunedModel

__all__ = ["Learner", "diverged", "fast_bf16", "normalised"]

CHECK_EVERY = 20  # steps between checks of the gradient, each of which waits for the GPU


class Learner:
    """A tuned model with its optimiser and devices.

    Attributes:
        tuned: The model.
        optimiser: AdamW over its trained parameters.
        precision: ``fp32`` or ``bf16``.

    Args:
        accelerator: Manages the devices and exchanges gradients between them.
        tuned: The model.
        preprocessing: Gives the normalisation of pixels.
        settings: The hyper-parameters.
        steps: Optimiser steps of an epoch.
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
        self.precision = settings.precision
        if settings.precision == "auto":
            self.precision = "bf16" if fast_bf16(self.device) else "fp32"

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
        sums = torch.zeros(3, device=self.device)
        rate, parts = 0.0, self.settings.accumulate

        def loss() -> str:  # waits for the GPU
            return f"loss {(sums[0] / sums[2]).item():.4f}"

        for i, (part, pixels, labels) in enumerate(loader.epoch(epoch)):
            is_last = (i + 1) % parts == 0
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                sums += self._backward(part, pixels, labels)
            if is_last:
                rate = self._step(epoch, part.step)
                tick(part.step, loss)
        return rate, *self._means(sums)

    def _backward(self, part: Part, pixels: Tensor, labels: Tensor) -> Tensor:
        """Add the gradients of a part; return its sums for ``_means``."""
        place = part.epoch, part.step, part.number
        settings = self.settings
        images, labels = self._prepared(pixels), labels.to(self.device)
        rng = generator(settings.seed, MIX, *place)
        images, share = mix(images, settings.mixup, settings.cutmix, rng)
        reseed(settings.seed, DEPTH, *place)
        logits = self._logits(self.model, images)
        losses = partial(
            F.cross_entropy, reduction="none", label_smoothing=settings.label_smoothing
        )
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

    @torch.no_grad()
    def evaluate(self, loader: Loader, tick: Callable[[int], object]) -> tuple[float, float]:
        """Mean loss and accuracy over all images of a loader.

        Args:
            loader: Gives the parts of this process.
            tick: Called after each part with the number of its images.
        """
        self.tuned.eval()
        sums = torch.zeros(3, device=self.device)
        for _, pixels, labels in loader.epoch(0):
            labels = labels.to(self.device)
            logits = self._logits(self.tuned, self._prepared(pixels))
            sums += _sums(F.cross_entropy(logits, labels, reduction="none"), logits, labels)
            tick(len(labels))
        return self._means(sums)

    def _means(self, sums: Tensor) -> tuple[float, float]:
        """Mean loss and accuracy from the sums of all processes."""
        loss, right, count = self.accelerator.reduce(sums, "sum").tolist()
        return loss / count, right / count

    def _prepared(self, pixels: Tensor) -> Tensor:
        on_device = pixels.to(self.device, non_blocking=True)
        return normalised(on_device, self.pixel_mean, self.pixel_std)

    def _logits(self, model: nn.Module, images: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits: Tensor = model(images)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _sums(losses: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of losses, number of correct answers, number of answers: shape (3,)."""
    right = (logits.argmax(-1) == labels).sum()
    return torch.stack([losses.sum(), right, losses.new_tensor(len(labels))])


def fast_bf16(device: torch.device) -> bool:
    """Whether the hardware computes bfloat16 faster than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        get_capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)  # not in older torch
        found = get_capabilities()
        return bool(found.get("amx_bf16") or found.get("avx512_bf16"))
    return False


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
