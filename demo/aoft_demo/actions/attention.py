"""The attention of a model to the patches of a picture, before and after fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aoft_demo.actions.pictures import read_picture
from aoft_demo.tasks.session import Session
from aoft_demo.tasks.shared_fleet import checkpoint_of

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Attention", "attention_of", "attention_overlay"]

SIDE = 384
"""Longer side of the overlay in pixels."""


@dataclass(frozen=True)
class Attention:
    """Attention to each patch, as shares of the attention to all patches.

    Attributes:
        before: Of the backbone before fine-tuning, float32 (rows, columns); its sum is 1.
        after: Of the task's model, likewise.
        whose: What attends: the class token, or all patches if there is no class token.
        pixels: The picture as the model sees it, uint8 (height, width, 3).
    """

    before: NDArray[np.float32]
    after: NDArray[np.float32]
    whose: str
    pixels: NDArray[np.uint8]

    @property
    def moved(self) -> float:
        """The share of the attention that fine-tuning moved to other patches, 0 to 1."""
        return float(np.abs(self.after - self.before).sum() / 2)

    @property
    def most(self) -> float:
        """The largest share of a patch in either map."""
        return float(max(self.before.max(), self.after.max()))


def attention_of(session: Session, name: str, picture: Path) -> Attention:
    """Attention in the last block, averaged over its heads.

    Args:
        session: Session with the task.
        name: Name of the task.
        picture: The picture's file.

    Raises:
        AoftError: The task has no checkpoint, it was removed in the meantime, or the picture cannot
            be read.
        NotImplementedError: The backbone is no plain Vision Transformer.
    """
    from aoft_deploy.checkpoints.backbone_source import BackboneSource
    from aoft_deploy.checkpoints.opening import open_checkpoint
    from aoft_deploy.checkpoints.trained_backbone import trained_backbone
    from aoft_deploy.data.normalisation import normalised

    with session.using(name) as task:
        path = checkpoint_of(task, name)
        source = BackboneSource(weights=session.shared.weights)
        tuned, checkpoint = open_checkpoint(path, source)
        plain, _ = trained_backbone(path, checkpoint, source)
    preprocessing = checkpoint.preprocessing
    size = max(preprocessing.height, preprocessing.width)
    pixels = preprocessing.pixels(read_picture(picture, size).image)
    inputs = normalised(pixels[None], preprocessing.mean, preprocessing.std)
    before, after = (_shares(model.eval(), inputs) for model in (plain, tuned.backbone))
    whose = "the class token" if _has_class_token(plain) else "all patches"
    return Attention(before, after, whose, pixels)


def attention_overlay(attention: Attention, grid: NDArray[np.float32]) -> Image.Image:
    """The picture as the model sees it; patches with little attention are dark.

    The brightness is the square root of the attention, so that small shares are visible too.

    Args:
        attention: Gives the picture, and the largest share, which is the brightest in both maps.
        grid: ``attention.before`` or ``attention.after``.

    Returns:
        RGB; the longer side has ``SIDE`` pixels.
    """
    height, width = attention.pixels.shape[:2]
    scale = SIDE / max(height, width)
    size = round(width * scale), round(height * scale)
    base = Image.fromarray(attention.pixels).resize(size, Image.Resampling.BICUBIC)
    levels = Image.fromarray(np.rint(255 * np.sqrt(grid / attention.most)).astype(np.uint8))
    smooth = np.asarray(levels.resize(size, Image.Resampling.BICUBIC), np.float32)
    light = smooth[..., None] / np.float32(255)
    tint = np.array([255, 150, 40], np.float32)
    mixed = np.asarray(base, np.float32) * (0.25 + 0.75 * light) + tint * 0.35 * light
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


def _has_class_token(model: Any) -> bool:
    return getattr(model, "cls_token", None) is not None


def _shares(model: nn.Module, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """A model's attention to the patches of one input, float32 (rows, columns) with sum 1."""
    import torch
    from timm.layers.attention import Attention as TimmAttention

    plain: Any = model
    blocks: Sequence[Any] = getattr(model, "blocks", ())
    attention: Any = getattr(blocks[-1], "attn", None) if len(blocks) else None
    rows, columns = getattr(getattr(model, "patch_embed", None), "grid_size", None) or (0, 0)
    if not isinstance(attention, TimmAttention) or not rows:
        raise NotImplementedError(
            f"{type(model).__name__} is no plain Vision Transformer, so it has no attention of one "
            "block to all patches that could be shown."
        )
    captured: list[Tensor] = []
    hook = attention.register_forward_pre_hook(lambda module, given: captured.append(given[0]))
    try:
        with torch.inference_mode():
            plain(torch.from_numpy(inputs))
            weights = _attention(attention, captured[0], 1 if _has_class_token(model) else None)
    finally:
        hook.remove()
    patches = weights[-rows * columns :]
    grid: NDArray[np.float32] = (patches / patches.sum()).reshape(rows, columns).float().numpy()
    return grid


def _attention(attention: Any, x: Tensor, queries: int | None) -> Tensor:
    """Attention to all tokens, (tokens,): the mean over heads and over the first queries."""
    batch, tokens, _ = x.shape
    heads = attention.num_heads
    query, key, _ = attention.qkv(x).reshape(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    query, key = attention.q_norm(query), attention.k_norm(key)
    scores = (query[:, :, :queries] * query.shape[-1] ** -0.5) @ key.mT
    mean: Tensor = scores.softmax(-1)[0].mean((0, 1))
    return mean
