"""The attention classes of timm: roles of their linear maps and row order of the fused ones.

The rows of a fused map are split only for the classes in these tables, whose forward was read. A
test shows that each part reaches the attention as q, k or v. Other classes are refused.
"""

from __future__ import annotations

from torch import nn

__all__ = [
    "LEAF_ROLES",
    "LEFT_ALONE",
    "OTHER_MAPS",
    "class_of",
    "fused_parts",
    "is_attention",
    "parts_refusal",
]

ROWS_BY_PART = {
    ("timm.layers.attention", "Attention"),
    ("timm.layers.attention", "AttentionRope"),
    ("timm.layers.attention2d", "Attention2d"),
    ("timm.layers.diff_attention", "DiffAttention"),
    ("timm.models.beit", "Attention"),
    ("timm.models.cait", "TalkingHeadAttn"),
    ("timm.models.coat", "FactorAttnConvRelPosEnc"),
    ("timm.models.convit", "GPSA"),
    ("timm.models.convit", "MHSA"),
    ("timm.models.davit", "ChannelAttention"),
    ("timm.models.davit", "ChannelAttentionV2"),
    ("timm.models.davit", "WindowAttention"),
    ("timm.models.edgenext", "CrossCovarianceAttn"),
    ("timm.models.eva", "EvaAttention"),
    ("timm.models.fastvit", "Attention"),
    ("timm.models.gcvit", "WindowAttentionGlobal"),
    ("timm.models.hiera", "MaskUnitAttention"),
    ("timm.models.hieradet_sam2", "MultiScaleAttention"),
    ("timm.models.maxxvit", "Attention2d"),
    ("timm.models.maxxvit", "AttentionCl"),
    ("timm.models.metaformer", "Attention"),
    ("timm.models.mvitv2", "MultiScaleAttention"),
    ("timm.models.nest", "Attention"),
    ("timm.models.pvt_v2", "Attention"),
    ("timm.models.swin_transformer", "WindowAttention"),
    ("timm.models.swin_transformer_v2", "WindowAttention"),
    ("timm.models.swin_transformer_v2_cr", "WindowMultiHeadAttention"),
    ("timm.models.tnt", "Attention"),
    ("timm.models.twins", "GlobalSubSampleAttn"),
    ("timm.models.twins", "LocallyGroupedAttn"),
    ("timm.models.visformer", "Attention"),
    ("timm.models.vision_transformer_relpos", "RelPosAttention"),
    ("timm.models.vision_transformer_sam", "Attention"),
    ("timm.models.volo", "Attention"),
    ("timm.models.volo", "ClassAttention"),
    ("timm.models.xcit", "XCA"),
}
"""Attention classes whose fused rows are ordered by part, each part (heads, head width)."""

ROWS_BY_HEAD = {
    ("timm.models.efficientformer", "Attention"),
    ("timm.models.tiny_vit", "Attention"),
}
"""Attention classes whose fused rows are ordered by head, so no part is a range of rows."""

SEPARATE = {
    ("timm.models.cait", "ClassAttn"),
    ("timm.models.crossvit", "CrossAttention"),
    ("timm.models.gemma4_vit", "Gemma4Attention"),
    ("timm.models.mvitv2", "MultiScaleAttentionPoolFirst"),
    ("timm.models.volo", "OutlookAttention"),
}
"""Attention classes without a fused map."""

FUSED = {"qkv": ("q", "k", "v"), "kv": ("k", "v"), "qk": ("q", "k")}
"""Names of fused maps and their parts, in the order of the rows."""


LEAF_ROLES = {
    **dict.fromkeys(("q", "q_proj", "wq"), "q"),
    **dict.fromkeys(("k", "k_proj", "wk"), "k"),
    **dict.fromkeys(("v", "v_proj", "wv"), "v"),
    **dict.fromkeys(("proj", "o_proj"), "proj"),
    "gate": "gate",
    **dict.fromkeys(("fc1", "fc1_g", "fc1_x", "w0", "w1", "gate_proj", "up_proj"), "fc1"),
    **dict.fromkeys(("fc2", "w2", "down_proj"), "fc2"),
    **dict.fromkeys(("conv", "conv1", "conv2", "conv3", "dwconv", "sr"), "conv"),
    **dict.fromkeys(("pool_q", "pool_k", "pool_v"), "conv"),
}
"""Roles of maps inside attention and MLP by name; the child ``.linear`` has its parent's role."""

OTHER_MAPS = (
    "attn",  # computes outlook attention's weights
    *("proj", "shortcut_proj_attn", "shortcut_proj_mlp"),  # widen a block's shortcut
    *("aligner", "merger", "pool", "projs", "revert_projs"),  # between branches or stages
)
"""Linear maps of the role ``other``, which only methods for every map update."""

LEFT_ALONE = (
    *("cpb_mlp", "crpe", "meta_mlp", "pos_proj", "rel_pos"),  # compute a bias from positions
    *("proj_l", "proj_w"),  # mix the scores of heads
    "se",  # scales channels
    *("attn_pool", "aux_head", "head"),  # follow the last block
)
"""Modules that no method updates."""


def class_of(module: nn.Module) -> tuple[str, str]:
    """Module and name of a module's class."""
    return type(module).__module__, type(module).__name__


def is_attention(module: nn.Module) -> bool:
    """Whether a module is of a known attention class."""
    return class_of(module) in ROWS_BY_PART | ROWS_BY_HEAD | SEPARATE


def fused_parts(attention: nn.Module, name: str) -> tuple[str, ...]:
    """Roles of the parts of a fused map in the order of its rows; empty if it is not fused.

    Args:
        attention: The module that owns the map.
        name: Name of the map in that module.
    """
    if class_of(attention) == ("timm.models.gcvit", "WindowAttentionGlobal"):
        return FUSED["kv" if attention.use_global else "qkv"] if name == "qkv" else ()
    return FUSED.get(name, ())


def parts_refusal(attention: nn.Module, path: str) -> str:
    """Why the parts of a fused map cannot be updated separately; empty if they can."""
    found = class_of(attention)
    if found in ROWS_BY_PART and not getattr(attention, "head_first", False):
        return ""
    known = found in ROWS_BY_PART | ROWS_BY_HEAD
    layout = "rows are ordered head by head" if known else "layout is not known"
    return (
        f"{path} is a {'.'.join(found)}, whose fused qkv {layout}: update the whole map with the "
        "role qkv, because q, k and v cannot be updated separately."
    )
