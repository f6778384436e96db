"""The hyper-parameters of a training run: defaults, meanings and ranges. Light to import."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from aoft_deploy.errors import SettingError

__all__ = ["AUGMENTATIONS", "LEARNING_RATES", "PRECISIONS", "TRAIN_ON", "TrainingSettings"]

AUGMENTATIONS = ("none", "flip", "affine", "window", "crop", "rand")
PRECISIONS = ("auto", "fp32", "bf16")
TRAIN_ON = ("train", "train+val")

LEARNING_RATES = {
    "adapter": 5e-3,
    "aoft-adapter": 5e-3,
    "aoft-adapter-star": 1e-2,
    "aoft-lora": 5e-3,
    "aoft-lora-star": 1e-2,
    "aoft-vpt": 1e-2,
    "aoft-vpt-star": 1e-2,
    "bitfit": 5e-3,
    "full": 3e-4,
    "lora": 5e-3,
    "rlrr": 1e-2,
    "ssf": 5e-3,
    "vpt": 1e-2,
}
"""Peak learning rate of each method's updates where none is given; other methods take 1e-3."""

HEAD_LEARNING_RATES = {"linear": 3e-2}
"""Peak learning rate of the classifier where none is given; with updates beside it 1e-2."""


@dataclass(frozen=True)
class TrainingSettings:
    """Everything that decides a run's numbers besides the data.

    Attributes:
        backbone: timm name.
        backbone_weights: File with its weights; None takes timm's own.
        img_size: Side of the input in pixels; None takes the backbone's own.
        crop_mode: How images are resized, ``center``, ``squash`` or ``border``, see
            ``Preprocessing``; None takes the backbone's own.
        crop_pct: Share of the resized image that is kept; None takes the backbone's own.
        method: Name of the fine-tuning method.
        method_settings: Its settings, such as ``{"rank": 16}``.
        epochs: Passes over the training images.
        stop_after: Epochs to do of these, with the learning rates of all; None does all.
        batch_size: Images of one optimiser step, over all processes and accumulated parts. An
            epoch is cut into equal steps of at most this size.
        accumulate: Parts that each step is computed in, one after the other, to save memory.
        lr: Peak learning rate of the updates; None takes the method's from ``LEARNING_RATES``.
        head_lr: Peak learning rate of the classifier; None takes the method's too.
        min_lr: Learning rate of the last step.
        warmup_epochs: Epochs of linear warm-up, fractions allowed.
        weight_decay: AdamW's decay of trained matrices; vectors are never decayed.
        clip_norm: Largest norm of the gradient; 0 for no limit.
        augment: ``none`` for the evaluation's preprocessing, ``flip`` to mirror half the images,
            ``affine`` to turn, shift and scale a little without mirroring, as suits digits,
            ``window`` to move the window that evaluation cuts from the resized image, and mirror,
            ``crop`` for random resized crops that are mirrored too, ``rand`` for RandAugment on
            top of these.
        mixup: Alpha of mixup; 0 for none.
        cutmix: Alpha of CutMix; 0 for none. With both, each batch takes one of them at random.
        label_smoothing: Share of the target that is spread over all classes.
        drop_path: Rate of stochastic depth at the last block, growing linearly from the first.
        precision: ``fp32``, ``bf16`` for autocast, or ``auto`` for bf16 where hardware has it.
        train_on: ``train``, with the epoch chosen on the validation images, or ``train+val`` to
            train on both and keep the last epoch.
        seed: Seed of everything random.

    Raises:
        SettingError: A value outside its range.
    """

    backbone: str = "aoft_vit_nano"
    backbone_weights: Path | None = None
    img_size: int | None = None
    crop_mode: str | None = None
    crop_pct: float | None = None
    method: str = "aoft-lora-star"
    method_settings: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 20
    stop_after: int | None = None
    batch_size: int = 32
    accumulate: int = 1
    lr: float | None = None
    head_lr: float | None = None
    min_lr: float = 1e-6
    warmup_epochs: float = 1.0
    weight_decay: float = 1e-4
    clip_norm: float = 1.0
    augment: str = "none"
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0
    drop_path: float = 0.0
    precision: str = "auto"
    train_on: str = "train"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "stop_after", "batch_size", "accumulate", "img_size"):
            self._check(name, whole=True, least=1)
        self._check("seed", whole=True, least=0)
        for name in ("lr", "head_lr"):
            self._check(name, above=0)
        for name in ("min_lr", "warmup_epochs", "weight_decay", "clip_norm", "mixup", "cutmix"):
            self._check(name, least=0)
        for name in ("label_smoothing", "drop_path"):
            self._check(name, least=0, below=1)
        if self.warmup_epochs > self.epochs:
            raise SettingError(
                f"warmup_epochs is {self.warmup_epochs}, but there are {self.epochs} epochs: "
                "use at most as many."
            )
        if self.epochs_done > self.epochs:
            raise SettingError(
                f"stop_after is {self.stop_after}, but there are {self.epochs} epochs: "
                "use at most as many."
            )
        if self.accumulate > self.batch_size:
            raise SettingError(
                f"accumulate is {self.accumulate}, but a batch has {self.batch_size} images: "
                "use at most as many."
            )
        for name, allowed in (
            ("augment", AUGMENTATIONS),
            ("precision", PRECISIONS),
            ("train_on", TRAIN_ON),
        ):
            if getattr(self, name) not in allowed:
                raise SettingError(
                    f"{name} is {getattr(self, name)!r}: use one of {', '.join(allowed)}."
                )

    def _check(
        self,
        name: str,
        *,
        whole: bool = False,
        least: float = -math.inf,
        above: float = -math.inf,
        below: float = math.inf,
    ) -> None:
        value = getattr(self, name)
        if value is None:
            return
        kind = isinstance(value, int) if whole else isinstance(value, int | float)
        if not (kind and not isinstance(value, bool) and least <= value < below and value > above):
            rule = "a whole number" if whole else "a number"
            for word, bound in (("from", least), ("above", above), ("below", below)):
                if math.isfinite(bound):
                    rule += f" {word} {bound}"
            raise SettingError(f"{name} is {value!r}: use {rule}.")

    @property
    def epochs_done(self) -> int:
        """Epochs that a whole run does."""
        return self.epochs if self.stop_after is None else self.stop_after

    def peak_rates(self) -> tuple[float, float]:
        """Peak learning rates of the updates and of the classifier."""
        rate = LEARNING_RATES.get(self.method, 1e-3) if self.lr is None else self.lr
        head = HEAD_LEARNING_RATES.get(self.method, 1e-2) if self.head_lr is None else self.head_lr
        return rate, head

    def to_dict(self) -> dict[str, Any]:
        """JSON form without the weights' path, which says nothing about their numbers."""
        values = asdict(self)
        del values["backbone_weights"]
        values["lr"], values["head_lr"] = self.peak_rates()
        return values
