"""Hyper-parameters for each task of VTAB-1k and FGVC. Light to import.

Where they come from:

* **Published code** (``VTABConfig.py``, ``FGVCConfig.py`` of github.com/zstarN70/RLRR): each
  task's learning rate, weight decay and depth rate for RLRR, whether images are mirrored, batches
  of 32, one rate for updates and classifier, a last rate of 1e-8, no clipping, and how images are
  resized. For which backbone they were tuned is not stated; the paper's main one is taken.
* **Paper** (arXiv 2403.19067, supplement, Table 3): 100 epochs with 10 of warm-up, also for FGVC,
  where the released script does 50; and ``RATES``, the grid of learning rates.
* **Our choice**: for every other method, AOFT included, whose paper's settings are not known to
  us, RLRR's values for the task but its learning rate, which is chosen from ``RATES`` by the
  validation images. Normalisation stays the backbone's own, which for the main backbone is the
  published 0.5 and 0.5.

Known differences from the published code: its ``drop_path`` zeroes single numbers of a branch, ours
whole branches; it decays the scales of the patch embedding, we do not; its rate rises by whole
epochs and rests for 10 more at the end, ours moves by steps; on CUB and Dogs it restarts the
cosine every 5 epochs; and it reports the best test accuracy of all epochs, where we choose the
epoch on validation images and test once.
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
"""Learning rates to choose from on validation images: the grid of RLRR's and HTA's papers."""

HEAD_ONLY = "linear"
"""The method that has a rate for the classifier alone."""

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
    VTAB.name: {"crop_pct": 1.0},  # Resize((224, 224)), the aspect ratio not kept
    # Resize((256, 256)); RandomCrop(224) and a flip in training, CenterCrop(224) in evaluation
    FGVC.name: {"crop_pct": 0.875, "augment": "window", "weight_decay": 5e-2},
}

# learning rate, weight decay, depth rate, mirrored
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

# learning rate, depth rate
FGVC_VALUES = {
    "CUB_200_2011": (3e-3, 0.1),
    "NABirds": (5e-4, 0.3),
    "OxfordFlowers": (3e-3, 0.2),
    "StanfordCars": (3e-3, 0.2),
    "StanfordDogs": (1e-4, 0.0),
}


@dataclass(frozen=True)
class Recipe:
    """How a task of a benchmark is trained.

    Attributes:
        benchmark: The task's benchmark.
        task: The task.
        settings: The hyper-parameters; the rates that ``rates`` decides stand as None.
        rates: Peak learning rates to choose from on validation images, at least one.
    """

    benchmark: Benchmark
    task: BenchmarkTask
    settings: TrainingSettings
    rates: tuple[float, ...]

    def at(self, rate: float) -> TrainingSettings:
        """The hyper-parameters with a rate for updates and classifier, where these are open."""
        settings = self.settings
        if settings.head_lr is None:
            settings = replace(settings, head_lr=rate)
        return settings if settings.method == HEAD_ONLY else replace(settings, lr=rate)


def get_recipe(name: str, given: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a task.

    Args:
        name: Benchmark and task, such as ``vtab/cifar``.
        given: Values of ``TrainingSettings``, such as the method, that win over the recipe's.
            With a learning rate among them (``lr``; for linear probing ``head_lr``), there is none
            to choose.

    Raises:
        UnknownNameError: No such task.
        SettingError: A value outside its range.
    """
    given = dict(given or {})
    benchmark, task = find_task(name)
    published_rate, values = _published(benchmark, task)
    values = {**COMMON, **PARTS[benchmark.name], **values, **given}
    values.setdefault("warmup_epochs", WARMUP_SHARE * values["epochs"])
    settings = TrainingSettings(**values)
    decisive = settings.head_lr if settings.method == HEAD_ONLY else settings.lr
    if decisive is not None:
        rates: tuple[float, ...] = (decisive,)
    else:
        rates = (published_rate,) if settings.method == "rlrr" else RATES
    return Recipe(benchmark, task, settings, rates)


def _published(benchmark: Benchmark, task: BenchmarkTask) -> tuple[float, dict[str, Any]]:
    """A task's learning rate and other values in the published configuration."""
    if benchmark is FGVC:
        rate, drop_path = FGVC_VALUES[task.name]
        return rate, {"drop_path": drop_path}
    rate, weight_decay, drop_path, mirrored = VTAB_VALUES[task.name]
    augment = "flip" if mirrored else "none"
    return rate, {"weight_decay": weight_decay, "drop_path": drop_path, "augment": augment}
