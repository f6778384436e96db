"""Sites of prompts: blocks that can take prompt tokens, and why others cannot."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from aoft_deploy.tuning.sites.attention_classes import (
    class_of,
)
from aoft_deploy.tuning.sites.site import (
    Site,
)

__all__ = ["token_site"]

ANY_LENGTH = {("timm.layers.attention", "Attention")}
"""Attention classes that accept any number of tokens, and so prompts beside them."""


ANY_LENGTH_ELSEWHERE = {
    ("timm.layers.diff_attention", "DiffAttention"),
    ("timm.models.cait", "ClassAttn"),
    ("timm.models.cait", "TalkingHeadAttn"),
    ("timm.models.convit", "MHSA"),
    ("timm.models.crossvit", "CrossAttention"),
    ("timm.models.davit", "ChannelAttention"),
    ("timm.models.davit", "ChannelAttentionV2"),
    ("timm.models.edgenext", "CrossCovarianceAttn"),
    ("timm.models.metaformer", "Attention"),
    ("timm.models.tnt", "Attention"),
    ("timm.models.xcit", "XCA"),
}
"""Attention classes that accept any number of tokens, in blocks that do not."""


IN_WINDOWS = {
    ("timm.models.swin_transformer", "SwinTransformerBlock"): (
        "timm.models.swin_transformer",
        "WindowAttention",
    ),
    ("timm.models.swin_transformer_v2", "SwinTransformerV2Block"): (
        "timm.models.swin_transformer_v2",
        "WindowAttention",
    ),
}
"""Block classes that can add prompts to each of their windows, and their attention classes."""


def token_site(model: nn.Module, path: str, attention: nn.Module, index: int) -> Site:
    """The site of a block's prompts."""
    block = model.get_submodule(path)
    windows = IN_WINDOWS.get(class_of(block)) == class_of(attention)
    embed = getattr(model, "patch_embed", getattr(model, "embeds", None))
    patch = getattr(embed, "patch_size", None) or 0
    width = getattr(model, "embed_dim", None)
    width = width if isinstance(width, int) else int(getattr(model, "num_features", 1))
    rows = (0, int(attention.dim) if windows else width)  # type: ignore[arg-type]
    site = Site(path, "block", path, "tokens", rows, rows[1], False, index=index, windows=windows)
    patch = patch if isinstance(patch, int) else patch[0]
    refusal = "" if windows else _prompts_refusal(model, path, attention, index)
    if "prompts" in block._modules:
        refusal = f"{path} has prompts already: attach the method to a plain model."
    return replace(site, patch=patch, embed_dim=width, refusal=refusal)


def _prompts_refusal(model: nn.Module, path: str, attention: nn.Module, index: int) -> str:
    """Why a block without windows cannot take prompts; empty if it can."""
    class_name = ".".join(class_of(attention))
    if class_of(attention) not in ANY_LENGTH | ANY_LENGTH_ELSEWHERE:
        return (
            f"The attention of {type(model).__name__} needs a fixed number of tokens "
            f"({class_name}): prompts cannot be added."
        )
    if (
        class_of(attention) not in ANY_LENGTH
        or path != f"blocks.{index}"
        or not hasattr(model, "num_prefix_tokens")
    ):
        return (
            f"The blocks of {type(model).__name__} are not one list of plain blocks for all tokens "
            f"({class_name}): prompts cannot be added."
        )
    return ""
