"""Sites of each model family: roles, shapes and order, and what is refused."""

from __future__ import annotations

import functools
import importlib
from collections import Counter
from typing import Any

import pytest
import timm
import torch
from torch import nn

from aoft_deploy.errors import AttachError
from aoft_deploy.tuning.sites.classifier import classifier_names
from aoft_deploy.tuning.sites.discovery import find_sites
from aoft_deploy.tuning.sites.site import LINEAR_ROLES, NORM_ROLES, Site

SMALL: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 2},
    "vit_small_patch14_reg4_dinov2": {"img_size": 28, "depth": 2},
    "deit_tiny_distilled_patch16_224": {"img_size": 32, "depth": 2},
    "beit_base_patch16_224": {"img_size": 32, "depth": 2},
    "eva02_base_patch14_224": {"img_size": 28, "depth": 2},
    "vit_base_patch16_siglip_224": {"img_size": 32, "depth": 2},
    "swin_tiny_patch4_window7_224": {"img_size": 32, "window_size": 2, "depths": (1, 1, 1, 1)},
    "swinv2_tiny_window8_256": {"img_size": 32, "window_size": 2, "depths": (1, 1, 1, 1)},
    "swinv2_cr_tiny_224": {"img_size": 64, "window_size": 2},
    "resnet18": {},
    "resnet50": {},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
}

BLOCK = {"block": 2, "q": 2, "k": 2, "v": 2, "proj": 2, "fc1": 2, "fc2": 2}
FUSED = {**BLOCK, "qkv": 2, "patch": 1}
WINDOWED = {**{role: 4 for role in BLOCK}, "qkv": 4, "norm": 9, "patch": 1}
MERGING = {"reduction": 3, "reduction_norm": 3}

ROLES: dict[str, dict[str, int]] = {
    "vit_tiny_patch16_224": {**FUSED, "norm": 5},
    "vit_small_patch14_reg4_dinov2": {**FUSED, "norm": 5},
    "deit_tiny_distilled_patch16_224": {**FUSED, "norm": 5},
    "beit_base_patch16_224": {**FUSED, "norm": 5, "q_bias": 2, "v_bias": 2},
    "vit_base_patch16_siglip_224": {**FUSED, "norm": 5},
    "swin_tiny_patch4_window7_224": {**WINDOWED, **MERGING},
    "swinv2_tiny_window8_256": {**WINDOWED, **MERGING, "q_bias": 4, "v_bias": 4},
    "resnet18": {"conv": 20, "batch_norm": 20},
    "resnet50": {"conv": 53, "batch_norm": 53},
    "convnext_atto": {"conv": 8, "fc1": 4, "fc2": 4, "norm": 9},
}


@functools.cache
def shapes(name: str) -> nn.Module:
    """The architecture on the meta device."""
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name, num_classes=3, **SMALL[name])
    return model


def sites(name: str) -> dict[str, Site]:
    return {site.name: site for site in find_sites(shapes(name))}


@pytest.mark.parametrize("name", ROLES)
def test_a_family_has_its_sites(name: str) -> None:
    found = find_sites(shapes(name))
    assert Counter(site.role for site in found) == ROLES[name]
    assert len({site.name for site in found}) == len(found)
    known = {*LINEAR_ROLES, *NORM_ROLES, "q_bias", "v_bias", "block"}
    assert {site.role for site in found} <= known
    assert not any(site.refusal for site in found if site.role != "block")


@pytest.mark.parametrize("name", SMALL)
def test_the_shape_of_a_site_is_that_of_its_rows(name: str) -> None:
    model = shapes(name)
    for site in find_sites(model):
        if site.role == "block":
            continue
        owner = model.get_submodule(site.module)
        tensor = owner.get_parameter(site.tensor)
        rows = site.out_features
        assert 0 <= site.rows[0] < site.rows[1] <= len(tensor) * site.kernel_height
        if site.tensor == "weight":
            assert site.rows[1] * site.in_features <= tensor.numel()
            own_bias = owner._parameters.get("bias") is not None
            assert site.bias is (own_bias or bool(site.absorber)), site.name
            whole = not site.part
            if whole:
                assert rows * site.in_features == tensor.numel()
                assert site.channels == len(tensor)
        else:
            assert rows == len(tensor)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swinv2_tiny_window8_256"])
def test_q_k_and_v_are_the_thirds_of_the_fused_rows(name: str) -> None:
    found = sites(name)
    for fused in (site for site in found.values() if site.role == "qkv"):
        third = fused.out_features // 3
        for i, role in enumerate("qkv"):
            part = found[f"{fused.name}.{role}"]
            assert part.part and not fused.part
            assert part.module == fused.module
            assert part.rows == (i * third, (i + 1) * third)
            assert part.in_features == fused.in_features


def test_the_shift_of_swins_reduction_is_absorbed_by_the_preceding_norm() -> None:
    for name, absorbed in (
        ("swin_tiny_patch4_window7_224", True),
        ("swinv2_tiny_window8_256", False),
    ):
        found = [site for site in find_sites(shapes(name)) if site.role == "reduction"]
        assert len(found) == 3
        for site in found:
            norm = f"{site.module.removesuffix('reduction')}norm"
            assert site.absorber == (norm if absorbed else "") and site.bias is absorbed


def test_a_convolution_is_the_map_of_the_published_matrix() -> None:
    found = sites("resnet18")
    stem, other = found["conv1"], found["layer2.0.conv1"]
    assert (stem.out_features, stem.in_features) == (64 * 7, 3 * 7)
    assert (other.out_features, other.in_features, other.channels) == (128 * 3, 64 * 3, 128)
    depthwise = sites("convnext_atto")["stages.0.blocks.0.conv_dw"]
    assert (depthwise.out_features, depthwise.in_features, depthwise.channels) == (40 * 7, 7, 40)


def test_blocks_have_an_index_and_the_width_of_their_tokens() -> None:
    blocks = [s for s in find_sites(shapes("vit_small_patch14_reg4_dinov2")) if s.role == "block"]
    assert [(s.name, s.index, s.in_features, s.patch) for s in blocks] == [
        ("blocks.0", 0, 384, 14),
        ("blocks.1", 1, 384, 14),
    ]
    assert not any(s.refusal for s in blocks)


@pytest.mark.parametrize(
    "name",
    [
        "swinv2_cr_tiny_224",
        "beit_base_patch16_224",
        "eva02_base_patch14_224",
    ],
)
def test_blocks_with_a_fixed_number_of_tokens_refuse_prompts(name: str) -> None:
    for site in find_sites(shapes(name)):
        if site.role == "block":
            assert "needs a fixed number of tokens" in site.refusal


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_blocks_of_windows_have_the_width_of_their_stage(name: str) -> None:
    blocks = [site for site in find_sites(shapes(name)) if site.role == "block"]
    assert [site.name for site in blocks] == [f"layers.{stage}.blocks.0" for stage in range(4)]
    assert [(site.index, site.in_features) for site in blocks] == [
        (0, 96),
        (1, 192),
        (2, 384),
        (3, 768),
    ]
    assert all(site.windows and not site.refusal for site in blocks)
    assert {(site.patch, site.embed_dim) for site in blocks} == {(4, 96)}


def test_maps_that_compute_a_position_bias_are_no_sites() -> None:
    model = shapes("swinv2_tiny_window8_256")
    assert any("cpb_mlp" in name for name, _ in model.named_modules())
    assert not any("cpb_mlp" in site.name for site in find_sites(model))


@pytest.mark.parametrize("name", ROLES)
def test_the_classifier_is_no_site(name: str) -> None:
    model = shapes(name)
    owners = {path.rpartition(".")[0] for path in classifier_names(model)}
    assert owners and not owners.intersection(site.module for site in find_sites(model))


def test_a_distilled_model_has_two_classifiers() -> None:
    assert classifier_names(shapes("deit_tiny_distilled_patch16_224")) == [
        "head.weight",
        "head.bias",
        "head_dist.weight",
        "head_dist.bias",
    ]


def test_a_model_without_classifier_is_refused() -> None:
    with pytest.raises(AttachError, match="has no classifier: create it with num_classes"):
        classifier_names(timm.create_model("resnet10t", num_classes=0))
    with pytest.raises(AttachError, match="Linear of torch is no timm model"):
        classifier_names(nn.Linear(2, 2))


def test_a_model_without_blocks_or_known_convolutions_is_refused() -> None:
    with pytest.raises(AttachError, match="MobileNetV3 has no transformer blocks"):
        find_sites(timm.create_model("mobilenetv3_small_050", num_classes=1))


def test_models_other_than_timms_are_refused_with_advice() -> None:
    transformers: Any = importlib.import_module("transformers")
    torchvision: Any = importlib.import_module("torchvision")
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.ViTConfig(image_size=16, patch_size=8, intermediate_size=8, **small)
    others = {
        "ViTForImageClassification of transformers": transformers.ViTForImageClassification(config),
        "ResNet of torchvision": torchvision.models.resnet18(num_classes=3),
        "Sequential of torch": nn.Sequential(nn.Linear(3, 2)),
    }
    for name, model in others.items():
        with pytest.raises(AttachError, match=f"^{name} is no timm model.*timm.create_model"):
            classifier_names(model)
    wrapped = nn.Module()
    wrapped.module = timm.create_model("test_vit", num_classes=3)
    with pytest.raises(AttachError, match="wrapper around a timm model: pass its attribute"):
        classifier_names(wrapped)
