"""Checkpoints of one backbone share its weights, and answer as if each had its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aoft_deploy.checkpoints import shared_backbone
from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.checkpoints.checkpoint import save
from aoft_deploy.checkpoints.opening import open_checkpoint
from aoft_deploy.checkpoints.shared_backbone import SharedBackbone
from aoft_deploy.tuning.attaching import attach
from aoft_deploy.tuning.backbones import timm_loading
from aoft_deploy.tuning.backbones.backbone import create_backbone
from aoft_deploy.tuning.tuned_model import TunedModel


@pytest.fixture
def created(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the backbones that are created."""
    names = list[str]()

    def recording(name: str, **options: Any) -> Any:
        names.append(name)
        return create_backbone(name, **options)

    monkeypatch.setattr(shared_backbone, "create_backbone", recording)
    return names


@pytest.fixture
def more_classes(
    make_tuned: Callable[..., TunedModel],
    backbone_name: str,
    backbone_args: dict[str, Any],
    backbone_weights: Path,
    tmp_path: Path,
) -> Path:
    """A checkpoint with nine classes."""
    model, identity = create_backbone(
        backbone_name, num_classes=9, weights=backbone_weights, **backbone_args
    )
    tuned = attach(model, "lora", backbone=identity)
    with torch.no_grad():
        for parameter in tuned.trained().values():
            parameter.normal_(std=0.1)
    save(tuned, tmp_path / "nine.ckpt", preprocessing=make_tuned("lora").preprocessing)
    return tmp_path / "nine.ckpt"


def test_tasks_share_weights_and_answer_as_alone(
    make_checkpoint: Callable[..., Path],
    more_classes: Path,
    backbone_weights: Path,
    created: list[str],
) -> None:
    source, shared = BackboneSource(weights=backbone_weights), SharedBackbone()
    paths = [make_checkpoint("rlrr"), make_checkpoint("aoft-lora-star"), more_classes]
    opened = [open_checkpoint(path, source, shared)[0] for path in paths]
    assert len(created) == 1
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for path, tuned in zip(paths, opened, strict=True):
        alone = open_checkpoint(path, source)[0]
        torch.testing.assert_close(tuned(x), alone(x), rtol=0, atol=0)
        assert tuned.identity == alone.identity
    positions = [each.backbone.get_parameter("pos_embed") for each in opened]
    assert len({weight.data_ptr() for weight in positions}) == 1
    heads = [each.backbone.get_parameter("head.weight") for each in opened]
    assert len({weight.data_ptr() for weight in heads}) == 3


def test_a_task_that_trained_every_weight_has_its_own(
    make_checkpoint: Callable[..., Path], backbone_weights: Path, created: list[str]
) -> None:
    source, shared = BackboneSource(weights=backbone_weights), SharedBackbone()
    first = open_checkpoint(make_checkpoint("lora"), source, shared)[0]
    before = first.backbone.get_parameter("patch_embed.proj.weight").clone()
    full = open_checkpoint(make_checkpoint("full"), source, shared)[0]
    after = first.backbone.get_parameter("patch_embed.proj.weight")
    assert torch.equal(before, after)
    assert not torch.equal(full.backbone.get_parameter("patch_embed.proj.weight"), after)
    assert len(created) == 1


def test_another_file_of_weights_is_another_backbone(
    backbone_name: str, backbone_args: dict[str, Any], backbone_weights: Path, created: list[str]
) -> None:
    shared = SharedBackbone()
    for weights, img_size in ((backbone_weights, 16), (backbone_weights, 32), (None, 16)):
        options = {**backbone_args, "img_size": img_size}
        if weights is None:
            options = {}
        shared(backbone_name, num_classes=2, weights=weights, **options)
    assert len(created) == 3


def test_initial_values_that_are_replaced_are_not_drawn(
    backbone_name: str, backbone_args: dict[str, Any], backbone_weights: Path
) -> None:
    state = torch.get_rng_state()
    options: dict[str, Any] = {"num_classes": 3, "weights": backbone_weights, **backbone_args}
    model, identity = create_backbone(backbone_name, classifier_follows=True, **options)
    assert torch.equal(state, torch.get_rng_state())
    full, same = create_backbone(backbone_name, **options)
    assert not torch.equal(state, torch.get_rng_state())
    assert identity == same
    for name, tensor in full.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_model_keeps_the_initial_values_that_its_loader_leaves(
    backbone_name: str, backbone_args: dict[str, Any]
) -> None:
    calls = list[int]()

    def leave_all(model: torch.nn.Module, timm_loading: Any) -> None:
        calls.append(1)

    torch.manual_seed(0)
    model = timm_loading.create_filled(
        backbone_name, leave_all, lambda model: ["head.weight"], **backbone_args
    )
    assert len(calls) == 2
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
