"""Parameter counts of every method, compared with the figures in the papers.

The papers of AOFT and RLRR count the classifier; their figure for LoRA leaves it out. On a
benchmark, the classifier counts with its mean over the tasks: 940 classes in the 19 tasks of
VTAB-1k, 1173 in the five of FGVC. With its bias it has classes · (width + 1) parameters.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import timm
import torch
from torch import nn

from aoft_deploy.tuning.methods import get_method
from aoft_deploy.tuning.sites.discovery import find_sites

VTAB, FGVC, CIFAR = 940 / 19, (200 + 555 + 102 + 120 + 196) / 5, 100.0
VIT_B, VIT_L, VIT_H = (
    f"vit_{size}_224" for size in ("base_patch16", "large_patch16", "huge_patch14")
)
SWIN_B = "swin_base_patch4_window7_224"
SWIN_FORM = {"fused_qkv": True, "norms": ["norm"]}


@functools.cache
def shapes(name: str) -> nn.Module:
    """The architecture on the meta device."""
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name, num_classes=1)
    return model


def update_parameters(name: str, method: str, **settings: Any) -> int:
    """Number of trained parameters in a method's updates."""
    chosen, sites, generator = get_method(method), find_sites(shapes(name)), torch.Generator()
    assert chosen.build is not None
    values = chosen.resolved(chosen.settings(settings), sites)
    updates = [chosen.build(site, values, generator) for site in sites]
    return sum(p.numel() for u in updates if u is not None for p in u.parameters())


def classifier(name: str, classes: float) -> float:
    width = shapes(name).get_classifier().in_features  # type: ignore[operator]
    return classes * (int(width) + 1)


@pytest.mark.parametrize(
    ("name", "method", "settings", "classes", "printed"),
    [
        (VIT_B, "rlrr", {}, VTAB, 0.33),
        (VIT_B, "rlrr", {}, FGVC, 0.47),
        (VIT_L, "rlrr", {}, VTAB, 0.82),
        (SWIN_B, "rlrr", SWIN_FORM, VTAB, 0.41),
        ("resnet18", "rlrr", {"rank": 10}, CIFAR, 0.29),
        ("resnet50", "rlrr", {"rank": 1}, CIFAR, 0.27),
        ("resnet50", "rlrr", {"rank": 10}, CIFAR, 0.85),
        (VIT_B, "aoft-lora", {}, FGVC, 0.22),
        (VIT_B, "aoft-adapter", {"shared": True}, VTAB, 0.06),
        (VIT_B, "aoft-adapter", {"targets": ["fc2"]}, VTAB, 0.06),
        (VIT_B, "aoft-adapter-star", {"shared": True}, VTAB, 0.06),
        (VIT_B, "aoft-adapter-star", {"shared": True}, FGVC, 0.20),
        (VIT_B, "aoft-vpt", {}, VTAB, 0.05),
        (VIT_B, "ssf", {}, VTAB, 0.24),
        (VIT_B, "ssf", {}, FGVC, 0.39),
        (VIT_L, "ssf", {}, VTAB, 0.60),
        (VIT_H, "ssf", {}, VTAB, 0.97),
        (VIT_B, "bitfit", {}, VTAB, 0.14),
        (VIT_B, "lora", {}, 0, 0.29),
    ],
)
def test_counts_round_to_the_printed_figures(
    name: str, method: str, settings: dict[str, Any], classes: float, printed: float
) -> None:
    count = update_parameters(name, method, **settings) + classifier(name, classes)
    assert round(count / 1e6, 2) == printed


@pytest.mark.parametrize(
    ("name", "rank", "classes", "printed"),
    [("resnet18", 1, CIFAR, 0.08), (VIT_H, 1, VTAB, 1.33)],
)
def test_two_printed_figures_are_off_by_one_in_their_last_place(
    name: str, rank: int, classes: float, printed: float
) -> None:
    """The papers print 0.0748 as 0.08 and 1.338 as 1.33. No choice of sites gives all figures.

    Shifts on convolutions, SSF on batch norms or an updated classifier would give ResNet-18's 0.08,
    but not ResNet-50's 0.27 and 0.85.
    """
    count = (update_parameters(name, "rlrr", rank=rank) + classifier(name, classes)) / 1e6
    assert round(count, 2) != printed
    assert abs(count - printed) < 0.01


@pytest.mark.parametrize(
    ("name", "method", "settings", "expected"),
    [
        (VIT_B, "rlrr", {}, 288_768),
        (VIT_L, "rlrr", {}, 765_952),
        (VIT_H, "rlrr", {}, 1_274_880),
        (SWIN_B, "rlrr", SWIN_FORM, 358_144),
        ("resnet18", "rlrr", {}, 23_509),
        ("resnet18", "rlrr", {"rank": 10}, 235_090),
        ("resnet50", "rlrr", {}, 64_597),
        ("resnet50", "rlrr", {"rank": 10}, 645_970),
        (VIT_B, "lora", {}, 12 * 2 * 2 * 768 * 8),
        (VIT_B, "adapter", {}, 12 * 2 * 2 * 768 * 8),
        (VIT_B, "vpt", {"rank": 50}, 12 * 50 * 768),
        (VIT_B, "vpt", {"rank": 50, "deep": False}, 50 * 768),
        (VIT_B, "aoft-lora", {}, 12 * 2 * 2 * 768),
        (VIT_B, "aoft-lora-star", {}, 12 * 2 * (2 * 768 + 8)),
        (VIT_B, "aoft-adapter", {}, 12 * 2 * 2 * 768),
        (VIT_B, "aoft-adapter", {"shared": True}, 24 * 768),
        (VIT_B, "aoft-vpt", {}, 12 * 768),
        (VIT_B, "aoft-vpt-star", {"rank": 20}, 12 * (768 + 20)),
        (VIT_B, "ssf", {}, 205_824),
        (VIT_B, "bitfit", {}, 102_912),
    ],
)
def test_updates_have_exactly_these_parameter_counts(
    name: str, method: str, settings: dict[str, Any], expected: int
) -> None:
    assert update_parameters(name, method, **settings) == expected


@pytest.mark.parametrize("rank", [1, 8, 64])
def test_the_parameter_count_of_aoft_does_not_depend_on_the_rank(rank: int) -> None:
    assert update_parameters(VIT_B, "aoft-lora", rank=rank) == 36_864
    assert update_parameters(VIT_B, "aoft-adapter", rank=rank, shared=True) == 18_432
    assert update_parameters(VIT_B, "aoft-vpt", rank=rank) == 9_216


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_rlrr_updates_only_convolutions_of_a_resnet_by_default(name: str) -> None:
    assert update_parameters(name, "rlrr") == update_parameters(name, "rlrr", norms=[])
    assert update_parameters(name, "rlrr", norms=["batch_norm"]) > update_parameters(name, "rlrr")


def test_the_parameter_count_of_the_classifier_includes_its_bias() -> None:
    assert classifier(VIT_B, VTAB) / 1e6 == pytest.approx(0.0380, abs=5e-5)
    assert classifier(VIT_B, FGVC) / 1e6 == pytest.approx(0.1804, abs=5e-5)
