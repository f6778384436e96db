"""Small timm models with random weights, one per architecture, and methods attached to them."""

from __future__ import annotations

import copy
import functools
from typing import Any

import timm
import torch
from torch import nn

from aoft_deploy import attach
from aoft_deploy.tuning.backbones.identity import identify, image_size
from aoft_deploy.tuning.tuned_model import TunedModel

NARROW: dict[str, Any] = {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 2}


SMALL: dict[str, Any] = {"img_size": 32, "depth": 2}


WINDOWS = {
    "img_size": 32,
    "window_size": 2,
    "depths": (2, 1),
    "embed_dim": 24,
    "num_heads": (3, 6),
}


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": SMALL,
    "swin_tiny_patch4_window7_224": WINDOWS,
    "swinv2_tiny_window8_256": WINDOWS,
    "resnet18": {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "vit_small_patch14_reg4_dinov2": {**NARROW, "img_size": 28, "depth": 2},
    "vit_small_patch16_224": NARROW,
    "vit_base_patch16_224": NARROW,
    "deit_tiny_distilled_patch16_224": NARROW,
    "deit3_small_patch16_224": NARROW,
    "beit_base_patch16_224": NARROW,
    "eva02_tiny_patch14_224": {**NARROW, "img_size": 28},
    "eva02_base_patch14_224": {**NARROW, "img_size": 28},
    "vit_giant_patch14_dinov2": {**NARROW, "img_size": 28},
    "vit_base_patch16_clip_224": NARROW,
    "vit_base_patch16_siglip_224": NARROW,
    "vit_relpos_small_patch16_224": NARROW,
}
"""Shallow and mostly narrow models: plain, shifted windows with biases inside and outside the
linear map, convolutions with both kinds of norm, registers, distilled, LayerScale, separate
q/k/v, gated MLP, pre-norm without patch bias, attention pooling, relative positions."""


PROMPTS = ("aoft-vpt", "aoft-vpt-star", "vpt")


REFUSED: dict[str, str] = {
    "resnet18": "found no block in ResNet, which has batch_norm, conv",
    "convnext_atto": "found no block in ConvNeXt, which has conv, fc1, fc2, norm",
    "beit_base_patch16_224": r"Beit needs a fixed number of tokens \(timm.models.beit.Attention",
    "eva02_tiny_patch14_224": "Eva needs a fixed number of tokens",
    "eva02_base_patch14_224": "Eva needs a fixed number of tokens",
    "vit_relpos_small_patch16_224": "VisionTransformerRelPos needs a fixed number of tokens",
}
"""Architectures that cannot take prompts, and the messages."""


@functools.cache
def made(name: str) -> nn.Module:
    """A shallow model with random values in every parameter and every buffer of statistics."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=5, **ARCHITECTURES[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for path, buffer in model.named_buffers():
            if path.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer) * 0.2)
    return model


@functools.cache
def identity(name: str) -> Any:
    return identify(made(name))


def model(name: str = "vit_tiny_patch16_224", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy of an architecture's small model."""
    return copy.deepcopy(made(name)).to(dtype)


def trained(tuned: TunedModel, seed: int = 1) -> TunedModel:
    """The model, after noise is added to every trained parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.trained().values():
            parameter.add_(torch.empty_like(parameter).normal_(0, 0.05, generator=generator))
    return tuned


def tune(base: nn.Module, method: str, **settings: Any) -> TunedModel:
    """Attach a method and add noise to every trained parameter."""
    dtype = next(base.parameters()).dtype
    return trained(attach(base, method, **settings).to(dtype))


def image(base: nn.Module, batch: int = 2) -> torch.Tensor:
    size = image_size(base) or 32
    height, width = (size, size) if isinstance(size, int) else size
    dtype = next(base.parameters()).dtype
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(2)).to(
        dtype
    )


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


AT_THE_PRETRAINED_FUNCTION: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        name: (name, {})
        for name in ("aoft-lora-star", "aoft-adapter-star", "lora", "adapter", "bitfit")
    },
    "linear": ("linear", {}),
    "full": ("full", {}),
    "ssf without spread": ("ssf", {"init_std": 0.0}),
    "rlrr identity": ("rlrr", {"init": "identity"}),
    "rlrr identity of rank 3": ("rlrr", {"init": "identity", "rank": 3}),
    "rlrr identity of the left side": ("rlrr", {"init": "identity", "sides": "out"}),
    "rlrr identity of the right side": ("rlrr", {"init": "identity", "sides": "in"}),
    "rlrr identity without residual": ("rlrr", {"init": "identity", "residual": False}),
    "rlrr zero": ("rlrr", {"init": "zero"}),
    "strict shared adapter": ("aoft-adapter-star", {"strict": True, "shared": True}),
}


ELSEWHERE: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("aoft-lora", "aoft-adapter", *PROMPTS, "rlrr", "ssf")},
    "star adapter without residual": ("aoft-adapter-star", {"residual": False}),
    **{f"rlrr {init}": ("rlrr", {"init": init}) for init in ("normal", "uniform", "constant")},
}
