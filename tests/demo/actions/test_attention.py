"""The attention of a task's model to the patches of a picture."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import timm
import torch

from aoft_demo.actions.attention import Attention, attention_of, attention_overlay
from aoft_demo.tasks.session import Session
from aoft_demo.tasks.shared_fleet import bundled_checkpoints
from aoft_deploy import load

attention_module = importlib.import_module("aoft_demo.actions.attention")


def test_each_task_looks_elsewhere_than_the_plain_backbone(session: Session) -> None:
    picture = session.shared.examples[0]
    first, second = (path.stem for path in bundled_checkpoints()[:2])
    found, other = (attention_of(session, name, picture) for name in (first, second))
    assert found.after.sum() == pytest.approx(1) == pytest.approx(found.before.sum())
    assert found.after.min() >= 0 and found.whose == "the class token"
    assert np.array_equal(found.before, other.before)  # the backbone is the same
    assert found.moved > 0.01 and np.abs(found.after - other.after).max() > 1e-3
    assert found.most == max(found.before.max(), found.after.max())
    images = [attention_overlay(found, grid) for grid in (found.before, found.after)]
    assert {image.size for image in images} == {(384, 384)}
    assert np.asarray(images[0]).mean() != np.asarray(images[1]).mean()


def test_the_attention_is_that_of_the_model(session: Session) -> None:
    """timm's own attention without its fused kernel computes the same weights."""
    path, picture = bundled_checkpoints()[0], session.shared.examples[0]
    found, tuned = attention_of(session, path.stem, picture), load(path).eval()
    attention: Any = tuned.backbone.blocks[-1].attn  # type: ignore[index, union-attr]
    attention.fused_attn = False
    seen: list[torch.Tensor] = []
    attention.attn_drop.register_forward_hook(lambda module, given, out: seen.append(out))
    prepared = session.shared.fleet.preprocessing
    pixels = torch.from_numpy(found.pixels).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(x)[:, None, None] for x in (prepared.mean, prepared.std))
    with torch.inference_mode():
        tuned((pixels - mean) / std)
    patches = seen[0][0, :, 0, 1:].mean(0)
    expected = (patches / patches.sum()).reshape(found.after.shape).numpy()
    assert found.after == pytest.approx(expected, abs=1e-5)


def test_without_a_class_token_all_patches_are_counted() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=(32, 48), class_token=False, global_pool="avg", depth=1
    )
    grid = attention_module._shares(model.eval(), np.zeros((1, 3, 32, 48), np.float32))
    assert grid.shape == (2, 3) and grid.sum() == pytest.approx(1)


@pytest.mark.parametrize("name", ["resnet10t", "swin_tiny_patch4_window7_224"])
def test_other_backbones_are_refused_in_words(name: str) -> None:
    model = timm.create_model(name, pretrained=False)
    with pytest.raises(NotImplementedError, match="is no plain Vision Transformer"):
        attention_module._shares(model.eval(), np.zeros((1, 3, 32, 32), np.float32))


def test_the_share_that_moved_is_at_most_one() -> None:
    corner, middle = np.zeros((2, 3, 3), np.float32)
    corner[0, 0] = middle[1, 1] = 1
    pixels = np.zeros((9, 9, 3), np.uint8)
    assert Attention(corner, middle, "", pixels).moved == 1
    assert Attention(corner, (corner + middle) / np.float32(2), "", pixels).moved == 0.5
    assert Attention(corner, corner, "", pixels).moved == 0
