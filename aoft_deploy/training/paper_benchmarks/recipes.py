"""Hyper-parameters for each task of VTAB-1k and FGVC. Light to import.

Their sources:

* **Published code** (``VTABConfig.py``, ``FGVCConfig.py`` of github.com/zstarN70/RLRR): for each
  task the learning rate, weight decay, rate of stochastic depth and mirroring for RLRR; batches of
  32, the same learning rate for updates and classifier, a final rate of 1e-8, no clipping, and the
  resizing. It does not state for which backbone they were tuned; we use the paper's main one.
* **Paper** (arXiv 2403.19067, supplement, Table 3): 100 epochs with 10 of warm-up, also for FGVC,
  for which the released script uses 50; and ``RATES``, the grid of learning rates.
* **Our choice**: all other methods use RLRR's values for the task, except for the learning rate,
  which is chosen from ``RATES`` on the validation images. This includes AOFT, because we do not
  know the settings of its paper. Normalisation is the backbone's; for the main backbone it is the
  published 0.5 and 0.5.

Known differences from the published code: its ``drop_path`` zeroes single values of a branch, ours
whole branches; it decays the scales of the patch embedding, we do not; its learning rate changes
once per epoch and stays constant for 10 more epochs at the end, ours changes every step; on CUB and
Dogs it restarts the cosine every 5 epochs; and it reports the best test accuracy of all epochs,
while we choose the epoch on validation images and test once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from aoft_deploy.training.paper_benchmarks.tasks import (
    FGVC,
    VTAB,
    Benchmark,
    BenchmarkTask,
    find_task,
)
from aoft_deploy.training.settings import TrainingSettings

__all__ = ["RATES", "Recipe", "get_recipe"]

BACKBONE = "vit_base_patch16_224.orig_in21k"
"""ViT-B/16 of the papers' main tables: the original ImageNet-21k weights, input 224 x 224."""

RATES = (0.2, 0.1, 0.05, 0.01, 0.005, 0.001, 0.0001)
"""Learning rates to choose from on validation images: the grid of the RLRR and HTA papers."""

HEAD_ONLY = "linear"
"""The method that trains only the classifier, and so has only ``head_lr``."""

COMMON = {
    "backbone": BACKBONE,
    "epochs": 100,
    "batch_size": 32,
    "min_lr": 1e-8,
    "clip_norm": 0.0,
    "crop_mode": "squash",
}
WARMUP_SHARE = 0.1

PARTS: dict[str, dict[str, Any]] = {
    VTAB.name: {"crop_pct": 1.0},  # Resize((224, 224)), without keeping the aspect ratio
    # Resize((256, 256)); RandomCrop(224) and a flip in training, CenterCrop(224) in evaluation
    FGVC.name: {"crop_pct": 0.875, "augment": "window", "weight_decay": 5e-2},
}

# learning rate, weight decay, rate of stochastic depth, mirroring
VTAB_VALUES = {
    "caltech101": (1e-3, 5e-5, 0.1, False),
    "cifar": (3e-3, 5e-5, 0.1, False),
    "dtd": (2e-3, 5e-5, 0.1, True),
    "oxford_flowers102": (3e-3, 5e-2, 0.3, False),
    "oxford_iiit_pet": (1e-3, 5e-5, 0.1, True),
    "svhn": (5e-3, 5e-5, 0.3, False),
    "sun397": (1e-3, 5e-5, 0.1, False),
    "patch_camelyon": (3e-3, 5e-2, 0.3, True),
    "eurosat": (1e-3, 5e-5, 0.1, True),
    "resisc45": (3e-3, 5e-5, 0.0, False),
    "diabetic_retinopathy": (5e-3, 5e-5, 0.1, True),
    "clevr_count": (5e-3, 5e-5, 0.5, True),
    "clevr_dist": (1e-2, 5e-5, 0.2, True),
    "dmlab": (5e-3, 5e-5, 0.3, True),
    "kitti": (3e-3, 5e-2, 0.3, True),
    "dsprites_loc": (1e-2, 5e-5, 0.1, False),
    "dsprites_ori": (5e-3, 5e-5, 0.1, False),
    "smallnorb_azi": (5e-3, 5e-2, 0.3, False),
    "smallnorb_ele": (1e-3, 5e-5, 0.3, True),
}

# learning rate, rate of stochastic depth
FGVC_VALUES = {
    "CUB_200_2011": (3e-3, 0.1),
    "NABirds": (5e-4, 0.3),
    "OxfordFlowers": (3e-3, 0.2),
    "StanfordCars": (3e-3, 0.2),
    "StanfordDogs": (1e-4, 0.0),
}


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters for a task of a benchmark.

    Attributes:
        benchmark: The benchmark.
        task: The task.
        settings: The hyper-parameters; learning rates that are chosen from ``rates`` are None.
        rates: Peak learning rates to choose from on validation images, at least one.
    """

    benchmark: Benchmark
    task: BenchmarkTask
    settings: TrainingSettings
    rates: tuple[float, ...]

    def at(self, rate: float) -> TrainingSettings:
        """The hyper-parameters with a learning rate for updates and classifier, if it is open."""
        settings = self.settings
        if settings.head_lr is None:
            settings = replace(settings, head_lr=rate)
        return settings if settings.method == HEAD_ONLY else replace(settings, lr=rate)


def get_recipe(name: str, given: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a task.

    Args:
        name: Benchmark and task, such as ``vtab/cifar``.
        given: Values of ``TrainingSettings``, such as the method, that override the recipe. If
            they include the learning rate (``lr``; for linear probing ``head_lr``), none is chosen.

    Raises:
        UnknownNameError: No such task.
        SettingError: A value is outside its range.
    """
    given = dict(given or {})
    benchmark, task = find_task(name)
    published_rate, values = _published(benchmark, task)
    values = {**COMMON, **PARTS[benchmark.name], **values, **given}
    values.setdefault("warmup_epochs", WARMUP_SHARE * values["epochs"])
    settings = TrainingSettings(**values)
    given_rate = settings.head_lr if settings.method == HEAD_ONLY else settings.lr
    if given_rate is not None:
        rates: tuple[float, ...] = (given_rate,)
    else:
        rates = (published_rate,) if settings.method == "rlrr" else RATES
    return Recipe(benchmark, task, settings, rates)


def _published(benchmark: Benchmark, task: BenchmarkTask) -> tuple[float, dict[str, Any]]:
    """Learning rate and other values of a task in the published configuration."""
    if benchmark is FGVC:
        rate, drop_path = FGVC_VALUES[task.name]
        return rate, {"drop_path": drop_path}
    rate, weight_decay, drop_path, mirrored = VTAB_VALUES[task.name]
    augment = "flip" if mirrored else "none"
    return rate, {"weight_decay": weight_decay, "drop_path": drop_path, "augment": augment}
