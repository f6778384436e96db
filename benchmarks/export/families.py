"""A small model for each timm family with attention, and for ResNet and ConvNeXt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import timm
import torch
from timm.models import (
    gcvit,
    list_modules,
    metaformer,
    mvitv2,
    nest,
    volo,
)
from torch import Tensor, nn

CLASSES = 5


@dataclass(frozen=True)
class Family:
    """A small model that represents a family.

    Attributes:
        model: timm name.
        args: Arguments of ``timm.create_model``, or of ``cls``.
        size: Side of its images in pixels.
        cls: Class to call instead, if ``timm.create_model`` does not accept the arguments.
    """

    model: str
    args: Mapping[str, Any] = field(default_factory=dict)
    size: int = 64
    cls: Callable[..., nn.Module] | None = None


def plain(name: str, size: int = 32, **args: Any) -> Family:
    """A plain ViT of depth 2 and width 48."""
    args = {"img_size": size, "depth": 2, "embed_dim": 48, "num_heads": 3, **args}
    return Family(name, args, size)


def windowed(name: str) -> Family:
    """A Swin of two stages."""
    args = {"window_size": 2, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 3)}
    return Family(name, {"img_size": 32, **args}, 32)


FAMILIES = {
    "beit": plain("beit_base_patch16_224"),
    "byoanet": Family("halonet_h1", size=256),
    "cait": plain("cait_xxs24_224"),
    "coat": Family(
        "coat_tiny",
        {
            "img_size": 64,
            "embed_dims": (16, 16, 16, 16),
            "serial_depths": (1, 1, 1, 1),
            "parallel_depth": 1,
        },
    ),
    "convit": Family(
        "convit_tiny",
        {"img_size": 32, "depth": 3, "local_up_to_layer": 2, "embed_dim": 16, "num_heads": 4},
        32,
    ),
    "convnext": Family("test_convnext"),
    "cpubone": Family("cpubone_nano"),
    "crossvit": Family(
        "crossvit_tiny_240",
        {"embed_dim": (24, 48), "num_heads": (3, 3), "depth": ((1, 1, 0), (1, 1, 0))},
        240,
    ),
    "csatv2": Family("csatv2", size=128),
    "davit": Family(
        "davit_tiny",
        {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 64), "num_heads": (2, 4, 4, 8)},
    ),
    "deepseek_vit": plain("deepseek_vit_412m", 28),
    "deit": plain("deit3_small_patch16_224"),
    "edgenext": Family("edgenext_xx_small", {"dims": (8, 16, 16, 32), "depths": (1, 1, 2, 1)}),
    "efficientformer": Family(
        "efficientformer_l1", {"depths": (1, 1, 1, 2), "embed_dims": (16, 16, 32, 32)}, 224
    ),
    "efficientformer_v2": Family("efficientformerv2_s0", {"img_size": 64}),
    "efficientvit_mit": Family("efficientvit_b0"),
    "efficientvit_msra": Family("efficientvit_m0", size=224),
    "eva": plain("eva02_tiny_patch14_224", 28),
    "fastvit": Family("fastvit_sa12", {"layers": (1, 1, 1, 2), "embed_dims": (32, 32, 64, 64)}),
    "gcvit": Family(
        "gcvit_xxtiny",
        {
            "img_size": 64,
            "window_size": (2, 2, 2, 1),
            "embed_dim": 16,
            "depths": (2, 2, 2, 2),
            "num_heads": (2, 2, 4, 4),
        },
        cls=gcvit.GlobalContextVit,
    ),
    "gemma4_vit": plain("gemma4_vit_167m", 48),
    "hiera": Family(
        "hiera_tiny_224", {"img_size": (64, 64), "embed_dim": 16, "stages": (1, 2, 2, 1)}
    ),
    "hieradet_sam2": Family("hieradet_small", {"embed_dim": 32, "stages": (1, 2, 3, 1)}, 128),
    "iformer": Family("iformer_t"),
    "levit": Family(
        "levit_128s",
        {"img_size": 64, "embed_dim": (32, 48, 64), "depth": (1, 1, 1), "num_heads": (2, 2, 2)},
    ),
    "lowformer": Family("lowformer_b0"),
    "maxxvit": Family("test_maxvit", size=160),
    "metaformer": Family(
        "caformer_s18",
        {
            "depths": (1, 1, 1, 1),
            "dims": (16, 32, 32, 64),
            "token_mixers": [metaformer.SepConv] * 2 + [metaformer.Attention] * 2,
            "norm_layers": [metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2,
        },
        cls=metaformer.MetaFormer,
    ),
    "mobilenetv3": Family("mobilenetv4_hybrid_medium"),
    "mobilenetv5": Family("mobilenetv5_base"),
    "mobilevit": Family("mobilevit_xxs"),
    "mvitv2": Family(
        "mvitv2_tiny",
        {"img_size": 64, "cfg": mvitv2.MultiScaleVitCfg(depths=(1, 1, 1, 1), embed_dim=16)},
        cls=mvitv2.MultiScaleVit,
    ),
    "naflexvit": plain("naflexvit_base_patch16_gap"),
    "nest": Family(
        "nest_tiny",
        {"img_size": 32, "embed_dims": (16, 24, 24), "num_heads": (2, 3, 3), "depths": (1, 1, 1)},
        32,
        nest.Nest,
    ),
    "nextvit": Family("nextvit_small", {"depths": (1, 1, 5, 1)}),
    "pit": Family(
        "pit_ti_224",
        {"img_size": 64, "base_dims": (16, 16, 16), "depth": (1, 1, 1), "heads": (1, 2, 2)},
    ),
    "pvt_v2": Family(
        "pvt_v2_b0",
        {"depths": (1, 1, 1, 1), "embed_dims": (16, 16, 24, 32), "num_heads": (1, 2, 3, 4)},
    ),
    "qwen3_vit": plain("qwen3_vit_88m"),
    "resnet": Family("test_resnet"),
    "shvit": Family("shvit_s1"),
    "swiftformer": Family("swiftformer_xs"),
    "swin_transformer": windowed("swin_tiny_patch4_window7_224"),
    "swin_transformer_v2": windowed("swinv2_tiny_window8_256"),
    "swin_transformer_v2_cr": windowed("swinv2_cr_tiny_224"),
    "tiny_vit": Family(
        "tiny_vit_5m_224",
        {
            "embed_dims": (16, 32, 32, 64),
            "depths": (1, 1, 1, 1),
            "num_heads": (1, 2, 2, 4),
            "window_sizes": (2, 2, 2, 2),
        },
    ),
    "tnt": Family(
        "tnt_s_patch16_224",
        {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads_outer": 3},
        32,
    ),
    "twins": Family(
        "twins_svt_small",
        {
            "img_size": 64,
            "depths": (1, 2, 2, 2),
            "embed_dims": (24, 48, 48, 48),
            "num_heads": (2, 3, 3, 3),
        },
    ),
    "visformer": Family(
        "visformer_tiny", {"img_size": 64, "embed_dim": 48, "depth": (1, 1, 1), "num_heads": 2}
    ),
    "vision_transformer": plain("vit_tiny_patch16_224"),
    "vision_transformer_hybrid": plain("vit_tiny_r_s16_p8_224", 64),
    "vision_transformer_relpos": plain("vit_relpos_small_patch16_224"),
    "vision_transformer_sam": plain(
        "samvit_base_patch16_224",
        64,
        depth=3,
        global_attn_indexes=(1,),
        window_size=2,
        neck_chans=32,
    ),
    "vitamin": Family(
        "vitamin_small_224", {"img_size": 64, "depth": 2, "embed_dim": 384, "num_heads": 6}
    ),
    "volo": Family(
        "volo_d1_224",
        {
            "img_size": 64,
            "layers": (1, 1, 1, 1),
            "embed_dims": (24, 48, 48, 48),
            "num_heads": (2, 3, 3, 3),
        },
        cls=volo.VOLO,
    ),
    "xcit": plain("xcit_nano_12_p8_224"),
}


OTHERS = frozenset(
    """byobnet convmixer cspnet cspnext densenet dla dpn efficientnet efficientvim fasternet
    focalnet ghostnet hardcorenas hgnet hrnet inception_next inception_resnet_v2 inception_v3
    inception_v4 lcnetv2 mambaout mlp_mixer nasnet nfnet pnasnet rdnet regnet repghost repvit
    res2net resnest resnetv2 rexnet selecsls senet sequencer sknet starnet tresnet vgg vovnet
    xception xception_aligned""".split()
)
"""timm's other families: convolutions, MLPs, state-space and recurrent models, without attention
between tokens. CNNs that have it only in a few variants count here too."""


def unlisted() -> list[str]:
    """Families of the installed timm that are in neither list."""
    own = (name for name in list_modules() if find_spec(f"timm.models.{name}") is not None)
    return sorted(set(own) - set(FAMILIES) - OTHERS)


@torch.no_grad()
def representative(family: Family) -> nn.Module:
    """The small model of a family with random parameters, so that none is zero or one."""
    torch.manual_seed(0)
    make = family.cls or partial(timm.create_model, family.model)
    model = make(num_classes=CLASSES, **family.args).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(noise * (0.02 if parameter.dim() > 1 else 0.1))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
        elif name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model


def images(family: Family, batch: int, dtype: torch.dtype) -> Tensor:
    """Random pixels."""
    generator = torch.Generator().manual_seed(batch)
    return torch.rand(batch, 3, family.size, family.size, generator=generator).to(dtype)
