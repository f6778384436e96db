"""Where updates go in a timm model: its linear maps, norms and patch embedding, by role.

A fused qkv linear is three sites, one for each third of its rows, because its methods treat q, k
and v apart. That needs to know how the rows are laid out, so fused attention is taken only from
classes whose layout is known; any other is named in the error instead of guessed at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from aoft_deploy.delta import Rows, matrix_shape
from aoft_deploy.errors import AttachError

__all__ = ["LINEAR_ROLES", "Site", "classifier_names", "find_sites"]

FUSED_QKV = {
    ("timm.layers.attention", "Attention"),
    ("timm.layers.attention", "AttentionRope"),
    ("timm.models.beit", "Attention"),
    ("timm.models.eva", "EvaAttention"),
    ("timm.models.swin_transformer", "WindowAttention"),
    ("timm.models.swin_transformer_v2", "WindowAttention"),
    ("timm.models.vision_transformer_relpos", "RelPosAttention"),
}
"""Attention classes whose fused qkv rows are (q, k, v), each (heads, head width)."""

ANY_LENGTH = {("timm.layers.attention", "Attention")}
"""Attention classes that take any number of tokens, so that prompts can stand beside them."""

CONVOLUTIONAL = {("timm.models.convnext", "ConvNeXt"), ("timm.models.resnet", "ResNet")}
"""Convolutional nets whose every convolution, MLP and norm is a site."""

LINEAR_ROLES = ("q", "k", "v", "qkv", "proj", "gate", "fc1", "fc2", "reduction", "conv")
"""Roles of linear maps. fc1 includes the gate of a gated MLP; qkv is a fused map as a whole."""

NORM_ROLES = ("norm", "reduction_norm", "batch_norm", "patch")
"""Roles of outputs that are scaled and shifted channel by channel."""

LEAF_ROLES = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "proj": "proj",
    "gate": "gate",
    "fc1": "fc1",
    "fc1_g": "fc1",
    "fc1_x": "fc1",
    "fc2": "fc2",
}

POSITION_MAPS = ("cpb_mlp", "rel_pos")
"""Parts of an attention that make its position bias, which no method updates."""


@dataclass(frozen=True)
class Site:
    """One place that can take an update.

    Attributes:
        name: Unique name, part of a checkpoint's tensor names.
        role: One of ``LINEAR_ROLES``; ``other`` for a linear map with no known role; ``q_bias``,
            ``v_bias``; ``norm``, ``reduction_norm``, ``batch_norm``; ``patch``; or ``block``.
        module: Path of the module that owns the tensors.
        tensor: Name of the tensor in it that plays the weight; ``tokens`` for a block.
        rows: Output rows that belong to this site, of the weight as a matrix.
        in_features: Width of the input; 1 where the tensor is a vector; a block's token width.
        bias: Whether there is a bias to shift.
        part: Whether it is a third of a fused map, beside a site for the whole.
        absorber: Path of the norm before a map without bias, whose bias can take the shift.
        index: Number of a block.
        patch: Side of the patches in pixels, of a block.
        kernel_height: Rows of the matrix for each output channel.
        refusal: Why no update can be put here; empty where one can.
    """

    name: str
    role: str
    module: str
    tensor: str
    rows: Rows
    in_features: int
    bias: bool
    part: bool = False
    absorber: str = ""
    index: int = 0
    patch: int = 0
    kernel_height: int = 1
    refusal: str = ""

    @property
    def out_features(self) -> int:
        """Number of output rows."""
        return self.rows[1] - self.rows[0]

    @property
    def channels(self) -> int:
        """Number of output channels, which a convolution's matrix has several rows of."""
        return self.out_features // self.kernel_height


def find_sites(model: nn.Module) -> list[Site]:
    """All sites of a timm transformer or convolutional net, in the order of its modules.

    Args:
        model: A plain timm model.

    Returns:
        Sites of every block and its attention, MLP and norms, of patch merging, of the final norm
        and of the patch embedding; or of every convolution and norm.

    Raises:
        AttachError: The model has no transformer blocks and is no net of ``CONVOLUTIONAL``.
    """
    if _class(model) in CONVOLUTIONAL:
        return list(_convolutional_sites(model))
    blocks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "attn", None), nn.Module)
        and isinstance(getattr(module, "mlp", None), nn.Module)
    ]
    if not blocks:
        raise AttachError(
            f"{type(model).__name__} has no transformer blocks (modules with attn and mlp): "
            "give a timm Vision Transformer, such as vit_base_patch16_224."
        )
    sites = list(_patch_sites(model))
    for index, (name, block) in enumerate(blocks):
        sites.append(_block_site(model, name, block, index))
        sites += _norm_sites(block, name, ("norm1", "norm2"))
        sites += _attention_sites(block.get_submodule("attn"), f"{name}.attn")
        sites += _linear_sites(block.get_submodule("mlp"), f"{name}.mlp")
    for name, module in model.named_modules():
        if isinstance(getattr(module, "reduction", None), nn.Linear):
            sites += _reduction_sites(module, name)
    return sites + list(_norm_sites(model, "", ("norm", "fc_norm")))


def classifier_names(model: nn.Module) -> list[str]:
    """Names of the classifier's parameters; a distilled model has two classifiers.

    Args:
        model: A timm model.

    Raises:
        AttachError: The model has no trainable classifier.
    """
    get = getattr(model, "get_classifier", None)
    heads = get() if get is not None else ()
    heads = heads if isinstance(heads, (tuple, list)) else (heads,)
    owned = {id(p) for head in heads for p in head.parameters()}
    names = [name for name, p in model.named_parameters() if id(p) in owned]
    if not names:
        raise AttachError(
            f"{type(model).__name__} has no classifier: create it with num_classes of 1 or more."
        )
    return names


def _class(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__, type(module).__name__


def _block_site(model: nn.Module, path: str, block: nn.Module, index: int) -> Site:
    """A block as a place for prompts."""
    attention = block.get_submodule("attn")
    plain = _class(attention) in ANY_LENGTH
    refusal = (
        ""
        if plain and path == f"blocks.{index}"
        else f"The attention of {type(model).__name__} is bound to its number of tokens "
        f"({'.'.join(_class(attention))}): prompts cannot stand beside them."
    )
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", (0,))
    width = getattr(model, "embed_dim", 0)
    width = width if isinstance(width, int) else 0
    rows = (0, width)
    return Site(
        path,
        "block",
        path,
        "tokens",
        rows,
        width,
        False,
        index=index,
        patch=patch[0],
        refusal=refusal,
    )


def _attention_sites(attention: nn.Module, path: str) -> Iterator[Site]:
    fused = getattr(attention, "qkv", None)
    if isinstance(fused, nn.Linear):
        yield from _fused_sites(attention, fused, path)
    for name in ("q_bias", "v_bias"):
        vector = attention._parameters.get(name)
        if vector is not None:
            yield Site(f"{path}.{name}", name, path, name, (0, len(vector)), 1, True)
    yield from _linear_sites(attention, path, skip=("qkv",))


def _fused_sites(attention: nn.Module, fused: nn.Linear, path: str) -> Iterator[Site]:
    refusal = (
        ""
        if _class(attention) in FUSED_QKV
        else f"{path} is a {'.'.join(_class(attention))}, whose fused qkv layout is not known: q, "
        "k and v cannot be updated apart."
    )
    yield _map_site(f"{path}.qkv", "qkv", fused)
    width = fused.out_features // 3
    for i, role in enumerate("qkv"):
        rows = (i * width, (i + 1) * width)
        whole = _map_site(f"{path}.qkv", role, fused)
        yield replace(whole, name=f"{path}.qkv.{role}", rows=rows, part=True, refusal=refusal)


def _linear_sites(parent: nn.Module, path: str, skip: tuple[str, ...] = ()) -> Iterator[Site]:
    for name, module in parent.named_modules():
        if name in skip or any(part in POSITION_MAPS for part in name.split(".")):
            continue
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            role = LEAF_ROLES.get(name.rpartition(".")[2], "other")
            refusal = f"{path}.{name} is a map with no known role in a block."
            site = _map_site(f"{path}.{name}", role, module)
            yield replace(site, refusal=refusal if role == "other" else "")


def _map_site(path: str, role: str, module: nn.Linear | nn.Conv2d) -> Site:
    """A linear map, or a convolution as the map of its (O·kh, I·kw) matrix."""
    rows, columns = matrix_shape(module.weight)
    site = Site(path, role, path, "weight", (0, rows), columns, module.bias is not None)
    return replace(site, kernel_height=rows // len(module.weight))


def _reduction_sites(merging: nn.Module, path: str) -> Iterator[Site]:
    """Swin's patch merging. Where a norm stands before the map, it can take the map's shift."""
    reduction, norm = merging.get_submodule("reduction"), getattr(merging, "norm", None)
    assert isinstance(reduction, nn.Linear)
    before = isinstance(norm, nn.LayerNorm) and norm.normalized_shape[0] == reduction.in_features
    site = _map_site(f"{path}.reduction", "reduction", reduction)
    if before and reduction.bias is None:
        site = replace(site, bias=True, absorber=f"{path}.norm")
    yield site
    yield from _norm_sites(merging, path, ("norm",), role="reduction_norm")


def _convolutional_sites(model: nn.Module) -> Iterator[Site]:
    head = {name.rpartition(".")[0] for name in classifier_names(model)}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if name in head or weight is None:
            continue
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            leaf = name.rpartition(".")[2]
            role = LEAF_ROLES.get(leaf, "conv" if isinstance(module, nn.Conv2d) else "other")
            plain = type(module) in (nn.Linear, nn.Conv2d)
            refusal = "" if plain and role != "other" else f"{name} is a {type(module).__name__}, "
            refusal = refusal and refusal + "whose weight is not used as it stands."
            yield replace(_map_site(name, role, module), refusal=refusal)
        elif weight.dim() == 1:
            batch_norm = isinstance(module, nn.BatchNorm2d)
            yield _output_site(name, "batch_norm" if batch_norm else "norm", module)


def _norm_sites(
    parent: nn.Module, path: str, names: tuple[str, ...], role: str = "norm"
) -> Iterator[Site]:
    for name in names:
        norm = getattr(parent, name, None)
        if isinstance(norm, nn.Module) and isinstance(norm._parameters.get("weight"), Tensor):
            yield _output_site(f"{path}.{name}".lstrip("."), role, norm)


def _patch_sites(model: nn.Module) -> Iterator[Site]:
    embed = getattr(model, "patch_embed", None)
    last = getattr(embed, "norm", None)
    if isinstance(last, nn.Module) and last._parameters.get("weight") is not None:
        yield _output_site("patch_embed.norm", "patch", last)
    elif isinstance(getattr(embed, "proj", None), (nn.Conv2d, nn.Linear)):
        yield _output_site("patch_embed.proj", "patch", embed.proj)  # type: ignore[union-attr]


def _output_site(path: str, role: str, module: nn.Module) -> Site:
    """A module whose output channels can be scaled and shifted."""
    weight = module._parameters["weight"]
    assert weight is not None
    bias = module._parameters.get("bias") is not None
    return Site(path, role, path, "weight", (0, len(weight)), weight[0].numel(), bias)
