"""Multi-task models: every sample gets the logits of its own task."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from aoft_deploy import attach, merge
from aoft_deploy.errors import AttachError, CheckpointError
from aoft_deploy.tuning.methods import method_names
from aoft_deploy.tuning.multitask import FoldedModel, MixedModel
from aoft_deploy.tuning.task_layout import Layout, classifier_rows
from aoft_deploy.tuning.tuned_model import TunedModel

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 2},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 2, "depths": (1, 2, 1, 1)},
    "vit_small_patch14_reg4_dinov2": {"img_size": 28, "depth": 2},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
}
CLASSES = (3, 7, 5)
REFUSED = {
    *(("convnext_atto", m) for m in ("aoft-vpt", "aoft-vpt-star", "vpt")),
    *(("convnext_atto", m) for m in ("aoft-lora", "aoft-lora-star", "lora", "rlrr")),
    *((name, "full") for name in ARCHITECTURES),
}
"""Architectures and methods that cannot be mixed."""


@functools.cache
def base(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=2, **ARCHITECTURES[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def tasks(name: str, method: str, **settings: Any) -> list[TunedModel]:
    """Tasks of one backbone with ``CLASSES`` classes and randomised parameters."""
    made = []
    for seed, classes in enumerate(CLASSES):
        model: Any = copy.deepcopy(base(name))
        model.reset_classifier(classes)
        tuned = attach(model, method, **settings)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in tuned.trained().values():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        made.append(tuned.eval())
    return made


def tables(tuned: list[TunedModel], layout: Layout) -> dict[str, Tensor]:
    count = torch.tensor(CLASSES)
    return {
        "bank": torch.stack([layout.row(t.trained()) for t in tuned]),
        "heads": torch.cat([classifier_rows(t) for t in tuned]),
        "first": count.cumsum(0) - count,
        "count": count,
        "columns": torch.arange(max(CLASSES)),
    }


def images(name: str, batch: int) -> Tensor:
    side = ARCHITECTURES[name].get("img_size", 32)
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize(
    ("name", "method"),
    [(n, m) for n in ARCHITECTURES for m in method_names() if (n, m) not in REFUSED],
)
@torch.no_grad()
def test_every_sample_of_a_mixed_batch_gets_the_logits_of_its_merged_task(
    name: str, method: str
) -> None:
    tuned = tasks(name, method)
    merged = [merge(t) for t in tuned]
    given = tables(tuned, Layout(tuned[0].updates))
    mixed = MixedModel(tuned[0])
    x = images(name, 6)
    for order in ([2, 0, 1, 1, 0, 2], [1, 1, 1, 1, 1, 1], [0, 1, 2, 2, 2, 0]):
        logits = mixed(x, torch.tensor(order), **given)
        assert logits.shape == (6, max(CLASSES))
        for sample, task in enumerate(order):
            expected = merged[task](x[sample : sample + 1])[0]
            own = logits[sample, : len(expected)]
            assert (own - expected).abs().max() <= 1e-5 * max(1, float(expected.abs().max()))
            assert logits[sample, len(expected) :].isneginf().all()


@pytest.mark.parametrize(
    ("name", "method"),
    [
        (n, m)
        for n in ARCHITECTURES
        for m in method_names()
        if m != "full" and not (n == "convnext_atto" and "vpt" in m)
    ],
)
@torch.no_grad()
def test_the_folded_model_gives_the_logits_of_the_merged_task(name: str, method: str) -> None:
    tuned = tasks(name, method)
    merged = [merge(t) for t in tuned]
    given = tables(tuned, Layout(tuned[0].updates))
    folded, x = FoldedModel(tuned[0]), images(name, 4)
    for task in (1, 0, 2, 1):
        logits, expected = folded(x, torch.full((4,), task), **given), merged[task](x)
        assert (logits[:, : CLASSES[task]] - expected).abs().max() <= 1e-5 * max(
            1, float(expected.abs().max())
        )
        assert logits[:, CLASSES[task] :].isneginf().all()


@torch.no_grad()
def test_the_folded_model_folds_biases_outside_their_map() -> None:
    base = timm.create_model("beit_base_patch16_224", num_classes=3, img_size=32, depth=1).eval()
    tuned = attach(base, "rlrr")
    with torch.no_grad():
        for parameter in tuned.trained().values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    expected, layout = merge(tuned)(torch.ones(2, 3, 32, 32)), Layout(tuned.updates)
    given = {
        "bank": layout.row(tuned.trained())[None],
        "heads": classifier_rows(tuned),
        "first": torch.tensor([0]),
        "count": torch.tensor([3]),
        "columns": torch.arange(3),
    }
    task = torch.zeros(2, dtype=torch.int64)
    assert torch.allclose(
        FoldedModel(tuned)(torch.ones(2, 3, 32, 32), task, **given), expected, atol=1e-5
    )


@pytest.mark.parametrize(("rank", "method"), [(32, "aoft-lora-star"), (32, "aoft-adapter")])
@torch.no_grad()
def test_a_diagonal_that_is_not_fused_gives_the_same_logits(rank: int, method: str) -> None:
    name = "vit_tiny_patch16_224"
    tuned = tasks(name, method, rank=rank)
    expected = [merge(t)(images(name, 1)) for t in tuned]
    given = tables(tuned, Layout(tuned[0].updates))
    logits = MixedModel(tuned[0])(images(name, 1).expand(3, -1, -1, -1), torch.arange(3), **given)
    for task, answer in enumerate(expected):
        assert torch.allclose(logits[task, : CLASSES[task]], answer[0], atol=1e-5)


@torch.no_grad()
def test_adding_a_task_does_not_change_the_logits_of_others() -> None:
    name = "vit_tiny_patch16_224"
    tuned = tasks(name, "aoft-lora-star")
    given = tables(tuned, Layout(tuned[0].updates))
    few = {k: v[:2] if k in ("bank", "first", "count") else v for k, v in given.items()}
    few["heads"] = given["heads"][: sum(CLASSES[:2])]
    mixed, x, order = MixedModel(tuned[0]), images(name, 4), torch.tensor([0, 1, 1, 0])
    assert torch.equal(mixed(x, order, **few), mixed(x, order, **given))


@pytest.mark.parametrize(
    ("name", "args", "method", "message"),
    [
        ("beit_base_patch16_224", {"img_size": 32}, "rlrr", "biases outside its linear map"),
        ("beit_base_patch16_224", {"img_size": 32}, "aoft-lora", "read by its parent"),
        ("convnext_atto", {}, "rlrr", "is a convolution"),
        ("vit_tiny_patch16_224", {"img_size": 32}, "full", "changes every weight"),
        ("deit_tiny_distilled_patch16_224", {"img_size": 32}, "lora", "no single linear class"),
    ],
)
def test_models_that_cannot_be_mixed_are_refused_with_the_reason(
    name: str, args: dict[str, Any], method: str, message: str
) -> None:
    depth = {"depths": (1, 1, 1, 1)} if name == "convnext_atto" else {"depth": 1}
    tuned = attach(timm.create_model(name, num_classes=3, **args, **depth), method)
    layout, side = Layout(tuned.updates), args.get("img_size", 32)
    with pytest.raises(AttachError, match=message):
        mixed = MixedModel(tuned)
        mixed(
            torch.zeros(1, 3, side, side),
            torch.zeros(1, dtype=torch.int64),
            torch.zeros(1, layout.row_length),
            torch.zeros(3, mixed.width + 1),
            torch.tensor([0]),
            torch.tensor([3]),
            torch.arange(3),
        )


def test_a_task_with_other_settings_is_refused() -> None:
    first, other = (tasks("vit_tiny_patch16_224", "lora", rank=r)[0] for r in (2, 4))
    with pytest.raises(CheckpointError, match=r"must have shape \(2, 192\)"):
        Layout(first.updates).row(other.trained())


def test_a_row_has_one_entry_per_parameter_of_the_updates() -> None:
    tuned = tasks("vit_tiny_patch16_224", "rlrr")[0]
    length = sum(p.numel() for n, p in tuned.trained().items() if n.startswith("update."))
    assert Layout(tuned.updates).row_length == length
