"""The contestants of a race: ways to answer a batch whose pictures belong to different skills."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.engine import Engine
from aoft_deploy.errors import MissingExtraError
from aoft_deploy.fleet.fleet import Fleet
from aoft_deploy.fleet.task import TaskKind

__all__ = ["Batch", "Contestant", "mixed_batch", "onnx_bytes", "peft_batch", "separate_models"]

Rows = list[NDArray[np.float32]]
"""The logits of each picture of a batch, in its order."""

DEFAULT_RANK = 8
"""Rank of PEFT's LoRA if the fleet's method has none."""


class Batch(NamedTuple):
    """Pictures, and the skill that each of them is for.

    Attributes:
        images: Normalised, float32 (pictures, 3, H, W).
        skill: Index of each picture's skill.
        skills: Number of skills.
    """

    images: NDArray[np.float32]
    skill: tuple[int, ...]
    skills: int

    @classmethod
    def of(cls, pictures: NDArray[np.float32], skills: int, per_skill: int) -> Batch:
        """A batch in which the skills take turns, and each gets other pictures.

        Args:
            pictures: Normalised, float32 (any number, 3, H, W); they repeat if there are too few.
            skills: Number of skills.
            per_skill: Pictures for each skill.
        """
        numbers = range(skills * per_skill)
        chosen = [(i // skills + i % skills) % len(pictures) for i in numbers]
        return cls(pictures[chosen], tuple(i % skills for i in numbers), skills)


@dataclass(frozen=True)
class Contestant:
    """A way to answer a batch.

    Attributes:
        run: Answers the batch and returns the logits of each picture.
        weights: Bytes of all weights that it holds in memory.
    """

    run: Callable[[], Rows]
    weights: int


def mixed_batch(fleet: Fleet, keys: Sequence[str], batch: Batch, weights: int) -> Contestant:
    """One pass of the fleet, in which each picture is answered with the weights of its skill.

    Args:
        fleet: The fleet.
        keys: The skills' names in the fleet.
        batch: The pictures.
        weights: Bytes of the backbone and the skills.
    """
    names = [keys[i] for i in batch.skill]

    def run() -> Rows:
        return [answer.logits for answer in fleet.predict(batch.images, names)]

    return Contestant(run, weights)


def separate_models(engines: Sequence[Engine], weights: int, batch: Batch) -> Contestant:
    """A merged model for each skill, one after the other; each gets its pictures as one batch.

    Args:
        engines: The skills' merged models, in order.
        weights: Bytes of their weights.
        batch: The pictures.
    """
    skill = np.array(batch.skill)
    places = [np.flatnonzero(skill == i) for i in range(batch.skills)]
    parts = [np.ascontiguousarray(batch.images[place]) for place in places]

    def run() -> Rows:
        rows: dict[int, NDArray[np.float32]] = {}
        for engine, place, part in zip(engines, places, parts, strict=True):
            rows.update(zip(place.tolist(), engine.run(part), strict=True))
        return [rows[i] for i in range(len(skill))]

    return Contestant(run, weights)


def onnx_bytes(path: Path) -> int:
    """Bytes of the weights in an ONNX file."""
    import onnx

    total = 0
    for tensor in onnx.load(path).graph.initializer:
        item = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        total += int(np.prod(tensor.dims, dtype=np.int64)) * item
    return total


def peft_batch(
    kind: TaskKind, backbone: Path | None, classes: int, batch: Batch, threads: int
) -> Contestant:
    """PEFT's mixed batch: a LoRA and a classifier with random weights for each skill.

    The LoRA is on the layers that the fleet's skills change, and has their rank.

    Args:
        kind: What the fleet's skills share.
        backbone: File with the backbone's weights; None takes timm's own.
        classes: Width of each classifier.
        batch: The pictures.
        threads: PyTorch's threads during a run.

    Raises:
        MissingExtraError: PEFT is not installed.
        BackboneError: The backbone cannot be created.
        ValueError: PEFT cannot adapt the backbone.
    """
    import torch

    model = _peft_model(kind, backbone, classes, batch.skills)
    pixels, names = torch.from_numpy(batch.images), [_adapter(i) for i in batch.skill]

    def run() -> Rows:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with torch.inference_mode():
                return list(model(pixels, adapter_names=names).numpy())
        finally:
            torch.set_num_threads(before)

    tensors = [*model.parameters(), *model.buffers()]
    return Contestant(run, sum(tensor.numel() * tensor.element_size() for tensor in tensors))


def _peft_model(kind: TaskKind, weights: Path | None, classes: int, adapters: int) -> Any:
    """A timm model with as many adapters of random weights."""
    try:
        import peft
    except ImportError:
        raise MissingExtraError("peft", "peft") from None
    import torch

    from aoft_deploy.tuning.backbones.backbone import create_backbone
    from aoft_deploy.tuning.sites.classifier import classifier_names

    base, _ = create_backbone(kind.backbone, num_classes=classes, weights=weights, **kind.args)
    heads = sorted({name.rpartition(".")[0] for name in classifier_names(base)})
    config = peft.LoraConfig(
        r=lora_rank(kind.settings),
        lora_alpha=lora_rank(kind.settings),
        target_modules=_changed_layers(kind, base),
        modules_to_save=heads,
    )
    model = peft.get_peft_model(base, config, adapter_name=_adapter(0))
    for i in range(1, adapters):
        model.add_adapter(_adapter(i), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name or ".modules_to_save." in name:
                parameter.normal_(0.0, 0.02, generator=generator)
    return model.eval()


def lora_rank(settings: Mapping[str, Any]) -> int:
    """The rank of PEFT's LoRA: that of the fleet's method, or ``DEFAULT_RANK``."""
    rank = settings.get("rank")
    return rank if isinstance(rank, int) and rank > 0 else DEFAULT_RANK


def _adapter(index: int) -> str:
    return f"skill{index}"


def _changed_layers(kind: TaskKind, model: Any) -> list[str]:
    """The linear layers that the fleet's skills change; all but the classifier if none of them."""
    from torch import nn

    from aoft_deploy.tuning.sites.classifier import classifier_names

    heads = {name.rpartition(".")[0] for name in classifier_names(model)}
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    linear = [name for name in linear if name not in heads]
    changed = [
        name
        for name in linear
        if any(tensor.startswith(f"update.{name}.") for tensor, _ in kind.order)
    ]
    return changed or linear
