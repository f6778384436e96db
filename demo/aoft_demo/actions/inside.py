"""What training did to a backbone: angles, sizes of the updates, and where the model looks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aoft_demo.actions.classify import read_picture
from aoft_demo.tasks.shared_fleet import BUNDLED, checkpoint_of
from aoft_demo.tasks.visitors import Visitor

if TYPE_CHECKING:
    from torch import Tensor
__all__ = ["Family", "Insight", "attention_map", "insight", "lora_angles", "overlay"]


@dataclass(frozen=True)
class Family:
    """Angles between the vectors of some matrices.

    Attributes:
        name: What they are.
        pairs: How many angles.
        mean: In degrees.
        sd: Likewise.
        farthest: Largest deviation from 90 degrees.
        counts: How many in each of equal bins over 0 to 180 degrees.
    """

    name: str
    pairs: int
    mean: float
    sd: float
    farthest: float
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Insight:
    """What there is to see of a task.

    Attributes:
        families: Angles of the backbone, of the method, and of a LoRA to compare with.
        layers: Name of each changed layer and ‖ΔW‖₂ / ‖W‖₂ there.
        method: Name of the method.
        notes: Sentences on what there is not.
    """

    families: tuple[Family, ...]
    layers: tuple[tuple[str, float], ...]
    method: str
    notes: tuple[str, ...]


def insight(visitor: Visitor, name: str) -> Insight:
    """Angles and update sizes of a task.

    Raises:
        AoftError: The task has no checkpoint, it was removed meanwhile, or there is nothing to
            analyse.
    """
    with visitor.using(name) as task:
        path = checkpoint_of(task, name)
        found = _analysis(path, path.stat().st_mtime_ns, visitor.stage.weights)
    angles, method = found["angles"], str(found["method"])
    families = [_family(f"backbone, {kind}", angles[kind]) for kind in ("rows", "columns")]
    own = [kind for kind in ("down", "up", "prompts") if kind in angles]
    families += [_family(f"{method}, {kind}", angles[kind]) for kind in own]
    if method != "lora":
        known = lora_angles()
        families += [_family(f"LoRA, {kind}", known[kind]) for kind in own if kind in known]
    layers = tuple(
        (f"{layer['block']}.{layer['role']}", float(layer["change_ratio"]))
        for layer in found["layers"]
        if layer["change_ratio"] is not None
    )
    notes = tuple(note for note in found["notes"] if "metrics.jsonl" not in note)
    return Insight(tuple(families), layers, method, notes)


@lru_cache(maxsize=32)
def _analysis(path: Path, changed: int, weights: Path | None) -> dict[str, Any]:
    """Of a file as it was when it changed last."""
    from aoft_deploy.training.analysis.quantities import analyse_file

    return analyse_file(path, weights=weights)


@lru_cache(maxsize=1)
def lora_angles() -> Mapping[str, Any]:
    """Angles of a LoRA of the same rank on digits, by kind of matrix; see tools/demo_tasks.py."""
    found: Mapping[str, Any] = json.loads((BUNDLED / "lora_angles.json").read_text("utf-8"))
    return dict(found["angles"])


def _family(name: str, figures: Mapping[str, Any]) -> Family:
    return Family(
        name,
        figures["pairs"],
        figures["mean"],
        figures["sd"],
        figures["farthest_from_90"],
        tuple(figures["counts"]),
    )


def attention_map(visitor: Visitor, name: str, picture: Path) -> NDArray[np.float32]:
    """How much the class token of the last block looks at each patch, averaged over heads.

    Returns:
        (rows, columns), from 0 to 1 at the most looked-at patch.

    Raises:
        AoftError: The task has no checkpoint, it was removed meanwhile, or the picture cannot be
            used.
        NotImplementedError: The backbone has no class token, or another kind of attention.
    """
    import torch

    from aoft_deploy.checkpoints.backbone_source import BackboneSource
    from aoft_deploy.checkpoints.opening import open_checkpoint

    with visitor.using(name) as task:
        tuned, checkpoint = open_checkpoint(
            checkpoint_of(task, name), BackboneSource(weights=visitor.stage.weights)
        )
    preprocessing = checkpoint.preprocessing
    pixels = preprocessing(read_picture(picture, preprocessing.size).image)
    model: Any = tuned.backbone
    blocks: Sequence[Any] = getattr(model, "blocks", ())
    attention: Any = getattr(blocks[-1], "attn", None) if len(blocks) else None
    if getattr(model, "cls_token", None) is None or not hasattr(attention, "qkv"):
        raise NotImplementedError(
            f"{type(model).__name__} has no class token whose attention could be shown."
        )
    seen: list[Tensor] = []
    hook = attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        with torch.inference_mode():
            tuned.eval()(torch.from_numpy(pixels[None]))
            weights = _class_attention(attention, seen[0])
    finally:
        hook.remove()
    patches = weights[model.num_prefix_tokens :]
    side = round(len(patches) ** 0.5)
    grid: NDArray[np.float32] = patches[-side * side :].reshape(side, side).numpy()
    grid /= grid.max()
    return grid


def _class_attention(attention: Any, x: Tensor) -> Tensor:
    """The first token's attention to all tokens, (tokens,), the mean over heads."""
    batch, tokens, _ = x.shape
    heads = attention.num_heads
    query, key, _ = attention.qkv(x).reshape(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    query, key = attention.q_norm(query), attention.k_norm(key)
    scores = (query[:, :, :1] * query.shape[-1] ** -0.5) @ key.mT
    mean: Tensor = scores.softmax(-1)[0, :, 0].mean(0)
    return mean


def overlay(visitor: Visitor, picture: Path, grid: NDArray[np.float32]) -> Image.Image:
    """The picture as the model sees it, with what it does not look at in the dark."""
    preprocessing = visitor.stage.fleet.preprocessing
    pixels = preprocessing.pixels(read_picture(picture, preprocessing.size).image)
    seen = Image.fromarray(pixels).resize((384, 384), Image.Resampling.BICUBIC)
    levels = Image.fromarray((255 * grid).astype(np.uint8))
    smooth = np.asarray(levels.resize(seen.size, Image.Resampling.BICUBIC), np.float32)
    light = smooth[..., None] / np.float32(255)
    tint = np.array([255, 150, 40], np.float32)
    mixed = np.asarray(seen, np.float32) * (0.25 + 0.75 * light) + tint * 0.35 * light
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))
