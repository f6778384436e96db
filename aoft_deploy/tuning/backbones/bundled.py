"""The bundled backbone `aoft_vit_nano`: a small plain ViT with weights in this package.

`register` makes it known to timm, and importing this module does so too. No network is needed:

    aoft_deploy.register()
    timm.create_model("aoft_vit_nano", pretrained=True, num_classes=10)
    timm.create_model("aoft_vit_nano", pretrained=True, num_classes=0)  # class-token features

The weights were trained on formula-driven images only. `weights/aoft_vit_nano.md` is the model
card, and `tools/pretraining/train.py` is the training script.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    is_model,
    register_model,
)
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

__all__ = ["WEIGHTS", "aoft_vit_nano", "register"]

WEIGHTS = Path(__file__).with_name("weights") / "aoft_vit_nano.safetensors"
"""The bundled weights: float16, without a classifier."""

default_cfgs = generate_default_cfgs(
    {
        "aoft_vit_nano": {
            "file": str(WEIGHTS),
            "num_classes": 0,
            "input_size": (3, 64, 64),
            "fixed_input_size": True,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        }
    }
)


def aoft_vit_nano(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Build the bundled backbone, 2.7 M parameters: patch 8, width 192, depth 6, 3 heads.

    Args:
        pretrained: Load `WEIGHTS`; a classifier keeps its initial values.
        **kwargs: timm's own, such as `num_classes` (0 if not given), `drop_path_rate`, `img_size`.

    Returns:
        timm's unmodified `VisionTransformer`: [batch, 3, 64, 64] to [batch, num_classes]. If
        `num_classes` is 0, the output is the class token after the final norm, [batch, 192].
    """
    size = {"img_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 3}
    model: VisionTransformer = build_model_with_cfg(
        VisionTransformer,
        "aoft_vit_nano",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**size, **kwargs},
    )
    return model


def register() -> None:
    """Make `timm.create_model` know the bundled backbone; repeated calls change nothing."""
    if not is_model("aoft_vit_nano"):
        register_model(aoft_vit_nano)


register()
