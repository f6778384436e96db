"""What timm's transformers call their linear maps, and how the rows of fused ones lie.

Only a class that stands here has its fused rows split: its forward was read, and a test shows that
each part reaches the attention as q, k or v. Any other class is refused instead of guessed at.
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

ROWS_IN_TURN = {
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
"""Attention classes whose fused rows are one part after the other, each (heads, head width)."""

ROWS_BY_HEAD = {
    ("timm.models.efficientformer", "Attention"),
    ("timm.models.tiny_vit", "Attention"),
}
"""Attention classes whose fused rows go head by head, so that no part is a range of rows."""

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
"""Roles of maps inside attention and MLP by name; ``.linear`` in a wrapper has the wrapper's."""

OTHER_MAPS = (
    "attn",  # gives outlook attention's weights
    *("proj", "shortcut_proj_attn", "shortcut_proj_mlp"),  # widen a block's shortcut
    *("aligner", "merger", "pool", "projs", "revert_projs"),  # between branches or stages
)
"""Linear maps without a role of their own, for methods that update every map."""

LEFT_ALONE = (
    *("cpb_mlp", "crpe", "meta_mlp", "pos_proj", "rel_pos"),  # make a bias from positions
    *("proj_l", "proj_w"),  # mix the scores of heads
    "se",  # weighs channels
    *("attn_pool", "aux_head", "head"),  # stand behind the last block
)
"""Parts that no method updates."""


def class_of(module: nn.Module) -> tuple[str, str]:
    """Where a module's class is defined, and its name."""
    return type(module).__module__, type(module).__name__


def is_attention(module: nn.Module) -> bool:
    """Whether the module is of a known attention class."""
    return class_of(module) in ROWS_IN_TURN | ROWS_BY_HEAD | SEPARATE


def fused_parts(attention: nn.Module, name: str) -> tuple[str, ...]:
    """Roles of the parts of a fused map in the order of its rows; none where it is not fused.

    Args:
        attention: The module that owns the map.
        name: The map's name in it.
    """
    if class_of(attention) == ("timm.models.gcvit", "WindowAttentionGlobal"):
        return FUSED["kv" if attention.use_global else "qkv"] if name == "qkv" else ()
    return FUSED.get(name, ())


def parts_refusal(attention: nn.Module, path: str) -> str:
    """Why the parts of an attention's fused map cannot be updated apart; empty where they can."""
    kind = class_of(attention)
    if kind in ROWS_IN_TURN and not getattr(attention, "head_first", False):
        return ""
    known = kind in ROWS_IN_TURN | ROWS_BY_HEAD
    layout = "rows go head by head" if known else "layout is not known"
    return (
        f"{path} is a {'.'.join(kind)}, whose fused qkv {layout}: q, k and v cannot be updated "
        "apart, the whole map can with the role qkv."
    )
