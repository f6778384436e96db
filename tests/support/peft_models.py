"""Small timm models for PEFT adapters, registered with timm: a PEFT folder holds only a name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from aoft_deploy.checkpoints.opening import load
from aoft_deploy.tuning.merging import merge
from aoft_deploy.tuning.tuned_model import TunedModel

VIT, EVA, BEIT = "peft_test_vit", "peft_test_eva", "peft_test_beit"
SIZE, WIDTH, CLASSES = 32, 32, 6

PREFIX = "base_model.model."


X = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


default_cfgs = generate_default_cfgs(
    {
        name: {"input_size": (3, SIZE, SIZE), "classifier": "head", "mean": (0.1, 0.2, 0.3)}
        for name in (VIT, EVA, BEIT)
    }
)  # timm's register_model reads this name


SHAPE: dict[str, Any] = {
    "img_size": SIZE,
    "patch_size": 8,
    "embed_dim": WIDTH,
    "depth": 2,
    "num_heads": 2,
}


@register_model
def peft_test_vit(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """timm's ViT at a small size. It needs a name, because a PEFT folder contains no size."""
    model: VisionTransformer = build_model_with_cfg(
        VisionTransformer, VIT, pretrained, **{**SHAPE, **kwargs}
    )
    return model


@register_model
def peft_test_eva(pretrained: bool = False, **kwargs: Any) -> Eva:
    """EVA with separate q, k and v and a gated MLP, like eva02."""
    shape = {**SHAPE, "qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True}
    model: Eva = build_model_with_cfg(Eva, EVA, pretrained, **{**shape, **kwargs})
    return model


@register_model
def peft_test_beit(pretrained: bool = False, **kwargs: Any) -> Beit:
    """BEiT, whose attention reads its fused weight without calling the layer."""
    model: Beit = build_model_with_cfg(Beit, BEIT, pretrained, **{**SHAPE, **kwargs})
    return model


@torch.no_grad()
def randomised(module: nn.Module, seed: int, spread: float, only: str = "") -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = spread * torch.randn(parameter.shape, generator=generator)
        if only in name:
            is_scale = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(noise + 1 if is_scale else noise)
    return module


def base_model(name: str = VIT) -> nn.Module:
    model = timm.create_model(name, num_classes=CLASSES)
    return randomised(model, seed=1, spread=0.15).eval()


def options(folder: Path, weights: Path, *more: object, name: str = VIT) -> list[object]:
    return ["--merge", folder, "--backbone", name, "--backbone-weights", weights, *more]


def check(folder: Path, name: str, weights: Path, expected: Tensor) -> TunedModel:
    """Assert that our model gives PEFT's logits, tuned and merged."""
    tuned = load(folder, backbone=name, weights=weights)
    with torch.inference_mode():
        torch.testing.assert_close(tuned(X), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(merge(tuned)(X), expected, atol=1e-5, rtol=0)
    return tuned


def with_head(path: Path) -> Path:
    save_file(base_model().state_dict(), path)
    return path
