"""Where updates go in a timm model: its linear maps, norms and patch embedding, by role.

A fused qkv map is three sites, one for each third of its rows, beside one for the whole, because
methods treat q, k and v apart. That needs to know how the rows lie (``layouts``).

What a method would have to update but cannot is a site with a refusal, so that it fails when it is
attached. Left as they are, without a refusal: ``layouts.LEFT_ALONE``, convolutions of a block that
stand beside its attention and MLP, and what stands outside the blocks of a transformer besides
patch embedding, patch merging and final norm, such as the convolutional stages of a hybrid.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from aoft_deploy.errors import AttachError
from aoft_deploy.tuning.sites.attention_classes import (
    LEAF_ROLES,
    LEFT_ALONE,
    OTHER_MAPS,
    class_of,
    fused_parts,
    is_attention,
    parts_refusal,
)
from aoft_deploy.tuning.updates.delta import Rows, matrix_shape

__all__ = ["LINEAR_ROLES", "Site", "classifier_names", "find_sites"]

ANY_LENGTH = {("timm.layers.attention", "Attention")}
"""Attention classes that take any number of tokens, so that prompts can stand beside them."""

WITHOUT_POSITIONS = {
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
"""Attention classes that would take any number of tokens too, but in blocks that would not."""

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
"""Block classes, and their attention's, that can show prompts to each of their windows."""

CONVOLUTIONAL = {("timm.models.convnext", "ConvNeXt"), ("timm.models.resnet", "ResNet")}
"""Convolutional nets whose every convolution, MLP and norm is a site."""

MAPS = (nn.Linear, nn.Conv2d)
"""Layers that are linear maps, or convolutions seen as the map of their (O·kh, I·kw) matrix."""

QKV = ("qkv", "q", "q_proj")
"""Names by which an attention of an unknown class is taken for one."""

NOT_AS_IT_STANDS = "which may not use its weight as it stands."
"""Why a subclass of ``MAPS`` is refused, such as a convolution that standardises its weight."""

LINEAR_ROLES = ("q", "k", "v", "qkv", "proj", "gate", "fc1", "fc2", "reduction", "conv")
"""Roles of linear maps. fc1 includes the gate of a gated MLP; qkv is a fused map as a whole."""

NORM_ROLES = ("norm", "reduction_norm", "batch_norm", "patch")
"""Roles of outputs that are scaled and shifted channel by channel."""


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
        part: Whether it is a part of a fused map, beside a site for the whole.
        absorber: Path of the norm before a map without bias, whose bias can take the shift.
        index: Number of a block.
        patch: Side of the patches in pixels, of a block.
        embed_dim: Width of the patch embedding, of a block.
        windows: Whether a block sees prompts window by window, and hands none on.
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
    embed_dim: int = 0
    windows: bool = False
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
        AttachError: The model has no transformer blocks and is no net of ``CONVOLUTIONAL``, or part
            of its attention is of a class that is not known.
    """
    if class_of(model) in CONVOLUTIONAL:
        return _without_tied(model, list(_convolutional_sites(model)))
    blocks = [
        (path, module)
        for path, module in model.named_modules()
        if _branches(module) and not _is_left_alone(path)
    ]
    _refuse_unknown_attention(model, blocks)
    if not any(_attentions(block) for _, block in blocks):
        raise AttachError(
            f"{type(model).__name__} has no transformer blocks of a known kind (attention and "
            "MLP): give a timm Vision Transformer, such as vit_base_patch16_224, or use linear."
        )
    trunk = "encoder." if hasattr(model, "encoder") else ""
    sites = list(_patch_sites(model, trunk))
    for index, (path, block) in enumerate(blocks):
        sites += _block_sites(model, path, block, index)
    for path, module in model.named_modules():
        if isinstance(getattr(module, "reduction", None), nn.Linear):
            sites += _reduction_sites(module, path)
    for name in ("norm", "fc_norm", "head.norm"):
        sites += _norm_sites(model, f"{trunk}{name}")
    return _without_tied(model, [*sites, *_outside_sites(model, sites)])


def classifier_names(model: nn.Module) -> list[str]:
    """Names of the classifier's parameters; distilled and token-labelled models have two.

    Args:
        model: A timm model.

    Raises:
        AttachError: The model has no trainable classifier.
    """
    get = getattr(model, "get_classifier", None)
    heads = get() if get is not None else ()
    heads = heads if isinstance(heads, (tuple, list)) else (heads,)
    heads = [h for h in (*heads, getattr(model, "aux_head", None)) if isinstance(h, nn.Module)]
    owned = {id(p) for head in heads for p in head.parameters()}
    names = [name for name, p in model.named_parameters() if id(p) in owned]
    if not names:
        raise AttachError(_without_classifier(model))
    return names


def _without_classifier(model: nn.Module) -> str:
    """What to do about a model without a classifier of timm's."""
    called = type(model).__name__
    if hasattr(model, "get_classifier"):
        return f"{called} has no classifier: create it with num_classes of 1 or more."
    inner = getattr(model, "module", None)
    if hasattr(inner, "get_classifier"):
        return f"{called} is a wrapper around a timm model: hand over its attribute module."
    library = type(model).__module__.partition(".")[0]
    return (
        f"{called} of {library} is no timm model, whose classifier and layers are known by their "
        "names: make the same architecture with timm.create_model, such as vit_base_patch16_224, "
        "with num_classes of 1 or more."
    )


def _attentions(block: nn.Module) -> list[str]:
    """Names of a block's attentions: of a known class, or attn beside mlp with a map of its own."""
    beside = isinstance(getattr(block, "mlp", None), nn.Module)
    return [
        name
        for name, child in block.named_children()
        if is_attention(child)
        or (
            beside
            and name == "attn"
            and any(isinstance(getattr(child, n, None), MAPS) for n in QKV)
        )
    ]


def _branches(module: nn.Module) -> list[str]:
    """Names of a block's attentions and MLPs; none where the module is no block."""
    mlps = (n for n, c in module.named_children() if n.startswith("mlp") and any(c.children()))
    return [*_attentions(module), *mlps]


def _refuse_unknown_attention(model: nn.Module, blocks: list[tuple[str, nn.Module]]) -> None:
    """Refuse a model part of whose attention is not understood, so that none is left out."""
    known = {id(block.get_submodule(name)) for _, block in blocks for name in _attentions(block)}
    for path, module in model.named_modules():
        called = type(module).__name__
        if "Att" not in called or any(word in called for word in ("Block", "Partition", "Pool")):
            continue
        if id(module) not in known:
            raise AttachError(
                f"{path} is a {'.'.join(class_of(module))}, an attention whose maps are not known: "
                f"{type(model).__name__} takes only linear and full."
            )


def _block_sites(model: nn.Module, path: str, block: nn.Module, index: int) -> Iterator[Site]:
    attentions = _attentions(block)
    if attentions:
        yield _token_site(model, path, block.get_submodule(attentions[0]), index)
    for name, _ in block.named_children():
        if name.startswith("norm"):
            yield from _norm_sites(model, f"{path}.{name}")
    for name in _branches(block):
        branch, full = block.get_submodule(name), f"{path}.{name}"
        yield from (
            _attention_sites(branch, full) if name in attentions else _linear_sites(branch, full)
        )
    for name, child in block.named_children():
        if isinstance(child, nn.Linear):
            refusal = "" if name in OTHER_MAPS else f"{path}.{name} is a map with no known role."
            yield replace(_map_site(f"{path}.{name}", "other", child), refusal=refusal)


def _token_site(model: nn.Module, path: str, attention: nn.Module, index: int) -> Site:
    """A block as a place for prompts."""
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
    """Why a block without windows cannot take prompts; empty where it can."""
    kind = ".".join(class_of(attention))
    if class_of(attention) not in ANY_LENGTH | WITHOUT_POSITIONS:
        return (
            f"The attention of {type(model).__name__} is bound to its number of tokens ({kind}): "
            "prompts cannot stand beside them."
        )
    if (
        class_of(attention) not in ANY_LENGTH
        or path != f"blocks.{index}"
        or not hasattr(model, "num_prefix_tokens")
    ):
        return (
            f"The blocks of {type(model).__name__} are not one list of plain blocks for all tokens "
            f"({kind}): prompts cannot stand beside them."
        )
    return ""


def _attention_sites(attention: nn.Module, path: str) -> Iterator[Site]:
    fused = [n for n, c in attention.named_children() if fused_parts(attention, n) and _is_map(c)]
    for name in fused:
        yield from _fused_sites(attention, name, path)
    for name in ("q_bias", "v_bias"):
        vector = attention._parameters.get(name)
        if vector is not None:
            yield Site(f"{path}.{name}", name, path, name, (0, len(vector)), 1, True)
    yield from _linear_sites(attention, path, skip=tuple(fused))


def _fused_sites(attention: nn.Module, name: str, path: str) -> Iterator[Site]:
    """The whole of a fused map, and each of its parts."""
    fused, roles = attention.get_submodule(name), fused_parts(attention, name)
    assert isinstance(fused, MAPS)
    whole = _map_site(f"{path}.{name}", "qkv", fused)
    yield whole
    width = whole.out_features // len(roles)
    refusal = parts_refusal(attention, path)
    for i, role in enumerate(roles):
        part = replace(whole, name=f"{path}.{name}.{role}", role=role, part=True, refusal=refusal)
        yield replace(part, rows=(i * width, (i + 1) * width))


def _linear_sites(parent: nn.Module, path: str, skip: tuple[str, ...] = ()) -> Iterator[Site]:
    for name, module in parent.named_modules():
        if name in skip or _is_left_alone(name) or not isinstance(module, MAPS):
            continue
        leaf = name.removesuffix(".linear").rpartition(".")[2]
        role = LEAF_ROLES.get(leaf, "other")
        refusal = f"{path}.{name} is a map with no known role in a block."
        if not _is_map(module):
            refusal = f"{path}.{name} is a {type(module).__name__}, " + NOT_AS_IT_STANDS
        elif role != "other" or name in OTHER_MAPS:
            refusal = ""
        yield replace(_map_site(f"{path}.{name}", role, module), refusal=refusal)


def _outside_sites(model: nn.Module, sites: list[Site]) -> Iterator[Site]:
    """Linear maps that no block has: a role for none, a refusal for those not known."""
    known = {site.module for site in sites}
    known |= {name.rpartition(".")[0] for name in classifier_names(model)}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path not in known and not _is_left_alone(path):
            refusal = f"{path} is a linear map outside the blocks with no known role."
            refusal = "" if any(part in OTHER_MAPS for part in path.split(".")) else refusal
            yield replace(_map_site(path, "other", module), refusal=refusal)


def _without_tied(model: nn.Module, sites: list[Site]) -> list[Site]:
    """Refuse what is used in two places: an update would reach one of them only."""
    uses: Counter[int] = Counter()
    for module in model.modules():
        uses.update(id(child) for child in module._modules.values())
        uses.update(id(tensor) for tensor in module._parameters.values() if tensor is not None)
    checked = []
    for site in sites:
        owner = model.get_submodule(site.module)
        tied = max((uses[id(t)] for t in (owner, *owner.parameters(recurse=False))), default=0)
        refusal = f"{site.module} is used in {tied} places: an update would reach one of them only."
        checked.append(replace(site, refusal=refusal) if tied > 1 else site)
    return checked


def _is_map(module: nn.Module) -> bool:
    return type(module) in MAPS


def _is_left_alone(path: str) -> bool:
    return any(part in LEFT_ALONE for part in path.split("."))


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
    if isinstance(norm, nn.Module):
        yield _output_site(f"{path}.norm", "reduction_norm", norm)


def _convolutional_sites(model: nn.Module) -> Iterator[Site]:
    head = {name.rpartition(".")[0] for name in classifier_names(model)}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if name in head or weight is None or {"se", "pre_logits"}.intersection(name.split(".")):
            continue
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            leaf = name.rpartition(".")[2]
            role = LEAF_ROLES.get(leaf, "conv" if isinstance(module, nn.Conv2d) else "other")
            refusal = f"{name} is a {type(module).__name__}, " + NOT_AS_IT_STANDS
            refusal = "" if _is_map(module) and role != "other" else refusal
            yield replace(_map_site(name, role, module), refusal=refusal)
        elif weight.dim() == 1:
            batch_norm = isinstance(module, nn.BatchNorm2d)
            yield _output_site(name, "batch_norm" if batch_norm else "norm", module)


def _norm_sites(model: nn.Module, path: str) -> Iterator[Site]:
    """The norms at a path: one, several in a list, or none."""
    try:
        found = model.get_submodule(path)
    except AttributeError:
        return
    for name, norm in found.named_modules(prefix=path):
        if isinstance(norm._parameters.get("weight"), Tensor):
            is_batch = isinstance(norm, nn.modules.batchnorm._BatchNorm)
            yield _output_site(name, "batch_norm" if is_batch else "norm", norm)


def _patch_sites(model: nn.Module, trunk: str) -> Iterator[Site]:
    """The last layer of the patch embedding."""
    paths = [f"{trunk}{embed}" for embed in ("patch_embed", "embeds")]
    modules = dict(model.named_modules())
    for path in (f"{p}.{name}" for p in paths for name in ("norm", "proj", "input_proj")):
        module = modules.get(path)
        if module is not None and module._parameters.get("weight") is not None:
            yield _output_site(path, "patch", module)
            return


def _output_site(path: str, role: str, module: nn.Module) -> Site:
    """A module whose output channels can be scaled and shifted."""
    weight = module._parameters["weight"]
    assert weight is not None
    bias = module._parameters.get("bias") is not None
    return Site(path, role, path, "weight", (0, len(weight)), weight[0].numel(), bias)
