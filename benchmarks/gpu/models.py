"""The backbones of the measurements, and tasks tuned on them.

Importing this module registers the backbone of dry runs with timm, so that commands find it with
``--import benchmarks.gpu.models``.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from timm.models import build_model_with_cfg, generate_default_cfgs, is_model, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import aoft_deploy.tuning.backbones.bundled  # noqa: F401  (registers aoft_vit_nano with timm)
from aoft_deploy.artefacts.verification import random_pixels
from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.checkpoints.checkpoint import save
from aoft_deploy.data.normalisation import normalised
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.files import replacing
from aoft_deploy.tuning.attaching import attach
from aoft_deploy.tuning.backbones.backbone import create_backbone
from aoft_deploy.tuning.tuned_model import TunedModel
from benchmarks.gpu.run import Run

__all__ = [
    "CLASSES",
    "HALF",
    "METHOD",
    "Model",
    "attached",
    "exact",
    "large",
    "one_block_vit",
    "pictures",
    "plain",
    "small",
    "task_files",
    "tuned",
]

CLASSES = 100
METHOD = "aoft-lora-star"
HALF = (0.5, 0.5, 0.5)

default_cfgs = generate_default_cfgs(
    {
        "one_block_vit": {
            "input_size": (3, 32, 32),
            "fixed_input_size": True,
            "crop_pct": 1.0,
            "mean": HALF,
            "std": HALF,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
    }
)


def one_block_vit(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """The backbone of dry runs: one block of width 32 on images of 32 x 32 pixels."""
    size = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model: VisionTransformer = build_model_with_cfg(
        VisionTransformer, "one_block_vit", pretrained, **{**size, **kwargs}
    )
    return model


if not is_model("one_block_vit"):
    register_model(one_block_vit)


@dataclass(frozen=True)
class Model:
    """A backbone.

    Attributes:
        name: timm's name.
        side: Side of its images in pixels.
        weights: File with random weights; None for those inside the package.
    """

    name: str
    side: int
    weights: Path | None

    @property
    def source(self) -> BackboneSource:
        """The backbone for functions that open a checkpoint."""
        return BackboneSource(weights=self.weights)

    @property
    def preprocessing(self) -> Preprocessing:
        """How pictures become inputs."""
        return Preprocessing(self.side, 1.0, HALF, HALF)

    def pixels(self, count: int, seed: int = 0) -> NDArray[np.uint8]:
        """Images, uint8 [count, H, W, 3]."""
        return random_pixels(count, self.side, seed=seed)

    def inputs(self, count: int, seed: int = 0) -> NDArray[np.float32]:
        """The same images, normalised, float32 [count, 3, H, W]."""
        return normalised(self.pixels(count, seed), HALF, HALF)


def small(run: Run) -> Model:
    """The bundled backbone, whose steps take milliseconds."""
    return _dry(run) if run.dry else Model("aoft_vit_nano", 64, None)


def large(run: Run) -> Model:
    """ViT-B/16 with random weights, which is measured."""
    return _dry(run) if run.dry else _random(run, "vit_base_patch16_224", 224)


def _dry(run: Run) -> Model:
    return _random(run, "one_block_vit", 32)


def _random(run: Run, name: str, side: int) -> Model:
    """A backbone with random weights, the same in every process."""
    path = run.scratch / f"{name}.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        with replacing(path) as draft:
            save_file(timm.create_model(name, num_classes=0).state_dict(), draft)
    return Model(name, side, path)


def tuned(model: Model, method: str = METHOD, **settings: Any) -> TunedModel:
    """A model with the random, as if trained, updates and classifier of task 0."""
    made = attached(model, method, **settings)
    next(_tasks(made, [0]))
    return made


def attached(model: Model, method: str, **settings: Any) -> TunedModel:
    """A model with a method's updates as they are before training."""
    backbone, identity = create_backbone(model.name, num_classes=CLASSES, weights=model.weights)
    made = attach(backbone, method, backbone=identity, **settings).eval()
    with torch.no_grad():
        for name in made.classifier:  # timm initialises it with another seed
            made.backbone.get_parameter(name).zero_()
    return made


def _tasks(made: TunedModel, tasks: Iterable[int]) -> Iterator[int]:
    """Give the model the parameters of each task in turn."""
    initial = {name: parameter.clone() for name, parameter in made.trained().items()}
    for task in tasks:
        generator = torch.Generator().manual_seed(task)
        with torch.no_grad():
            for name, parameter in made.trained().items():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(initial[name] + 0.02 * noise)
        yield task


def plain(model: Model) -> nn.Module:
    """The backbone with a classifier and without updates."""
    return create_backbone(model.name, num_classes=CLASSES, weights=model.weights)[0]


def task_files(run: Run, model: Model, count: int, method: str = METHOD) -> list[Path]:
    """The checkpoints of tasks; the merged model of task 0 is the one that is measured."""
    paths = [run.scratch / f"{model.name}-{method}-{task}.ckpt" for task in range(count)]
    if not paths[-1].exists():
        classes = [f"class {i}" for i in range(CLASSES)]
        made = attached(model, method)
        for task in _tasks(made, range(count)):
            save(made, paths[task], classes=classes, preprocessing=model.preprocessing)
    return paths


def pictures(run: Run, model: Model, seed: int = 1) -> Path:
    """A folder of 16 image files of the model's size; other seeds give other images."""
    folder = run.scratch / f"pictures-{model.name}-{seed}"
    if not folder.exists():
        draft = run.scratch / f"{folder.name}-{os.getpid()}"
        draft.mkdir()
        for i, pixels in enumerate(model.pixels(16, seed)):
            Image.fromarray(pixels).save(draft / f"{i:03}.png")
        draft.rename(folder)
    return folder


def exact(model: nn.Module, images: NDArray[np.float32], device: str) -> NDArray[np.float64]:
    """Logits of a model in float64, by PyTorch."""
    double = copy.deepcopy(model).double().eval().to(device)
    with torch.inference_mode():
        logits: NDArray[np.float64] = (
            double(torch.from_numpy(images).double().to(device)).cpu().numpy()
        )
    return logits
