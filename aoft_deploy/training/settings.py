"""Hyper-parameters and options of a run: defaults, meanings and ranges. Light to import."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from aoft_deploy.errors import SettingError

__all__ = [
    "AUGMENTATIONS",
    "LEARNING_RATES",
    "PRECISIONS",
    "TRAIN_ON",
    "RunOptions",
    "TrainingSettings",
]

AUGMENTATIONS = ("none", "flip", "affine", "window", "crop", "rand")
PRECISIONS = ("auto", "fp32", "tf32", "bf16")
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
"""Default peak learning rate of each method's updates; 1e-3 for other methods."""

HEAD_LEARNING_RATES = {"linear": 3e-2}
"""Default peak learning rate of the classifier; 1e-2 for methods with updates."""


@dataclass(frozen=True)
class TrainingSettings:
    """The hyper-parameters: everything besides the data that determines the results of a run.

    Attributes:
        backbone: timm name.
        backbone_weights: File with its weights; None for those of timm.
        img_size: Side of the input in pixels; None for the backbone's default.
        crop_mode: How images are resized, ``center``, ``squash`` or ``border``, see
            ``Preprocessing``; None for the backbone's default.
        crop_pct: Fraction of the resized side that is kept; None for the backbone's default.
        method: Name of the fine-tuning method.
        method_settings: Its settings, such as ``{"rank": 16}``.
        epochs: Passes over the training images.
        stop_after: Stop after this epoch, but keep the learning-rate schedule of ``epochs``; None
            for all epochs.
        batch_size: Images of one optimiser step, over all processes and accumulated parts. An
            epoch is divided into equal steps of at most this size.
        accumulate: Number of parts that each step is computed in, one by one, to save memory.
        lr: Peak learning rate of the updates; None for the method's from ``LEARNING_RATES``.
        head_lr: Peak learning rate of the classifier; None for the method's default.
        min_lr: Learning rate of the last step.
        warmup_epochs: Epochs of linear warm-up, fractions allowed.
        weight_decay: Weight decay of trained matrices; vectors are never decayed.
        clip_norm: Largest norm of the gradient; 0 for no limit.
        augment: ``none`` for the preprocessing of evaluation; ``flip`` also mirrors half of the
            images; ``affine`` rotates, shifts and scales slightly, without mirroring, for classes
            such as digits; ``window`` crops the resized image at a random position and mirrors;
            ``crop`` takes a random resized crop and mirrors; ``rand`` adds RandAugment to ``crop``.
        mixup: Alpha of mixup; 0 for none.
        cutmix: Alpha of CutMix; 0 for none. With both, each batch uses one of them at random.
        label_smoothing: Fraction of the target that is spread over all classes.
        drop_path: Rate of stochastic depth at the last block; it grows linearly from the first.
        precision: ``fp32``; ``tf32`` for products in TF32 on an NVIDIA GPU; ``bf16`` for autocast;
            ``auto`` for bf16 if the hardware has it, else fp32.
        train_on: ``train`` chooses the epoch on the validation images; ``train+val`` trains on
            both and keeps the last epoch.
        seed: Seed of all random numbers.

    Raises:
        SettingError: A value is outside its range.
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
                f"`warmup_epochs` is {self.warmup_epochs}, but must be at most `epochs`, "
                f"{self.epochs}."
            )
        if self.epochs_done > self.epochs:
            raise SettingError(
                f"`stop_after` is {self.stop_after}, but must be at most `epochs`, {self.epochs}."
            )
        if self.accumulate > self.batch_size:
            raise SettingError(
                f"`accumulate` is {self.accumulate}, but must be at most `batch_size`, "
                f"{self.batch_size}."
            )
        for name, allowed in (
            ("augment", AUGMENTATIONS),
            ("precision", PRECISIONS),
            ("train_on", TRAIN_ON),
        ):
            if getattr(self, name) not in allowed:
                raise SettingError(
                    f"`{name}` is {getattr(self, name)!r}, but must be one of {', '.join(allowed)}."
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
            raise SettingError(f"`{name}` is {value!r}, but must be {rule}.")

    @property
    def epochs_done(self) -> int:
        """Epochs that a complete run trains."""
        return self.epochs if self.stop_after is None else self.stop_after

    def peak_rates(self) -> tuple[float, float]:
        """Peak learning rates of the updates and of the classifier."""
        rate = LEARNING_RATES.get(self.method, 1e-3) if self.lr is None else self.lr
        head = HEAD_LEARNING_RATES.get(self.method, 1e-2) if self.head_lr is None else self.head_lr
        return rate, head

    def to_dict(self) -> dict[str, Any]:
        """JSON form without the path of the weights, which does not identify their content."""
        values = asdict(self)
        del values["backbone_weights"]
        values["lr"], values["head_lr"] = self.peak_rates()
        return values


@dataclass(frozen=True)
class RunOptions:
    """How a run is executed; its results depend on these options only if images are unreadable.

    Attributes:
        resume: Continue the run in the output folder if there is one; the result is the same as
            that of an uninterrupted run.
        overwrite: Replace the run in the output folder if there is one, after all checks.
        workers: Processes that prepare images; None for none on a CPU and up to 8 for a GPU.
        progress: Show on stderr what is trained, and the progress.
        tensorboard: Also write the metrics for TensorBoard into the output folder.
        trust_images: Check only the headers of the training images before the first epoch, without
            decoding them.
        checkpointing: Keep only the inputs of the blocks for the backward pass, which computes each
            block again: less memory, more time, the same results.
        skip_unreadable: Leave out images that cannot be read, and list them in the output folder's
            ``unreadable.json``; a resumed run leaves out the same.

    Raises:
        SettingError: A value is outside its range, or options exclude each other.
    """

    resume: bool = False
    overwrite: bool = False
    workers: int | None = None
    progress: bool = False
    tensorboard: bool = False
    trust_images: bool = False
    checkpointing: bool = False
    skip_unreadable: bool = False

    def __post_init__(self) -> None:
        if self.resume and self.overwrite:
            raise SettingError(
                "`resume=True` continues a run and `overwrite=True` replaces it: give one of them."
            )
        if self.trust_images and self.skip_unreadable:
            raise SettingError(
                "`skip_unreadable=True` decodes every image: leave out `trust_images=True`."
            )
        if self.workers is not None and self.workers < 0:
            raise SettingError(f"`workers` is {self.workers}, but must be a whole number from 0.")
