"""The attention of a task's model to the patches of a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aoft_demo.actions.pictures import read_picture
from aoft_demo.tasks.session import Session
from aoft_demo.tasks.shared_fleet import checkpoint_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["attention_map", "attention_overlay"]

SIDE = 384
"""Side of the overlay in pixels."""


def attention_map(session: Session, name: str, picture: Path) -> NDArray[np.float32]:
    """Attention of the class token of the last block to each patch, averaged over heads.

    Args:
        session: Session with the task.
        name: Name of the task.
        picture: The picture's file.

    Returns:
        float32 (rows, columns), scaled to a maximum of 1.

    Raises:
        AoftError: The task has no checkpoint, it was removed in the meantime, or the picture cannot
            be read.
        NotImplementedError: The backbone has no class token, or its attention has no qkv layer.
    """
    import torch

    from aoft_deploy.checkpoints.backbone_source import BackboneSource
    from aoft_deploy.checkpoints.opening import open_checkpoint

    with session.using(name) as task:
        path = checkpoint_of(task, name)
        tuned, checkpoint = open_checkpoint(path, BackboneSource(weights=session.shared.weights))
    preprocessing = checkpoint.preprocessing
    pixels = preprocessing(
        read_picture(picture, max(preprocessing.height, preprocessing.width)).image
    )
    model: Any = tuned.backbone
    blocks: Sequence[Any] = getattr(model, "blocks", ())
    attention: Any = getattr(blocks[-1], "attn", None) if len(blocks) else None
    if getattr(model, "cls_token", None) is None or not hasattr(attention, "qkv"):
        raise NotImplementedError(
            f"{type(model).__name__} has no class token whose attention could be shown."
        )
    captured: list[Tensor] = []
    hook = attention.register_forward_pre_hook(lambda module, inputs: captured.append(inputs[0]))
    try:
        with torch.inference_mode():
            tuned.eval()(torch.from_numpy(pixels[None]))
            weights = _class_attention(attention, captured[0])
    finally:
        hook.remove()
    patches = weights[model.num_prefix_tokens :]
    side = round(len(patches) ** 0.5)
    grid: NDArray[np.float32] = patches[-side * side :].reshape(side, side).numpy()
    grid /= grid.max()
    return grid


def attention_overlay(session: Session, picture: Path, grid: NDArray[np.float32]) -> Image.Image:
    """The picture as the model sees it; patches with little attention are dark.

    Args:
        session: Session whose fleet prepares the picture.
        picture: The picture's file.
        grid: Result of ``attention_map``.

    Returns:
        RGB, ``SIDE`` x ``SIDE`` pixels.
    """
    preprocessing = session.shared.fleet.preprocessing
    pixels = preprocessing.pixels(
        read_picture(picture, max(preprocessing.height, preprocessing.width)).image
    )
    base = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    levels = Image.fromarray((255 * grid).astype(np.uint8))
    smooth = np.asarray(levels.resize(base.size, Image.Resampling.BICUBIC), np.float32)
    light = smooth[..., None] / np.float32(255)
    tint = np.array([255, 150, 40], np.float32)
    mixed = np.asarray(base, np.float32) * (0.25 + 0.75 * light) + tint * 0.35 * light
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


def _class_attention(attention: Any, x: Tensor) -> Tensor:
    """Attention of the first token to all tokens, (tokens,), the mean over heads."""
    batch, tokens, _ = x.shape
    heads = attention.num_heads
    query, key, _ = attention.qkv(x).reshape(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    query, key = attention.q_norm(query), attention.k_norm(key)
    scores = (query[:, :, :1] * query.shape[-1] ** -0.5) @ key.mT
    mean: Tensor = scores.softmax(-1)[0, :, 0].mean(0)
    return mean
