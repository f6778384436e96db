"""Find the sites of a timm model: its linear maps, norms and patch embedding, by role.

A fused qkv map has one site for the whole and three for q, k and v, because methods treat them
differently. ``attention_classes`` tells the order of its rows.

A layer that a method should update but cannot is a site with a refusal; attaching to it fails. Some
layers are no sites, without a refusal: ``LEFT_ALONE``, convolutions beside the attention and MLP of
a block, and layers outside the blocks of a transformer, such as the convolutional stages of a
hybrid. Patch embedding, patch merging and the final norm are sites.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

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
from aoft_deploy.tuning.sites.classifier import classifier_names
from aoft_deploy.tuning.sites.convolutional import CONVOLUTIONAL, convolutional_sites
from aoft_deploy.tuning.sites.prompt_sites import token_site
from aoft_deploy.tuning.sites.site import (
    MAPS,
    SUBCLASS_REFUSAL,
    Site,
    is_map,
    map_site,
    output_site,
)

__all__ = ["find_sites"]


QKV = ("qkv", "q", "q_proj")
"""Names of linear maps by which an attention of an unknown class is recognised."""


def find_sites(model: nn.Module) -> list[Site]:
    """All sites of a timm transformer or convolutional network, in the order of its modules.

    Args:
        model: A plain timm model.

    Returns:
        For a transformer: the sites of every block with its attention, MLP and norms, of patch
        merging, the final norm and the patch embedding. Otherwise: every convolution and norm.

    Raises:
        AttachError: The model has no transformer blocks and is not ``CONVOLUTIONAL``, or contains
            an attention class that is not known.
    """
    if class_of(model) in CONVOLUTIONAL:
        return _refuse_tied(model, list(convolutional_sites(model)))
    blocks = [
        (path, module)
        for path, module in model.named_modules()
        if _branches(module) and not _is_left_alone(path)
    ]
    _refuse_unknown_attention(model, blocks)
    if not any(_attentions(block) for _, block in blocks):
        raise AttachError(
            f"{type(model).__name__} has no transformer blocks of a known kind (attention and "
            "MLP): use a timm Vision Transformer, such as vit_base_patch16_224, or the method "
            "linear."
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
    return _refuse_tied(model, [*sites, *_outside_sites(model, sites)])


def _attentions(block: nn.Module) -> list[str]:
    """Names of a block's attentions: known classes, and ``attn`` beside ``mlp`` with a qkv map."""
    has_mlp = isinstance(getattr(block, "mlp", None), nn.Module)
    return [
        name
        for name, child in block.named_children()
        if is_attention(child)
        or (
            has_mlp
            and name == "attn"
            and any(isinstance(getattr(child, n, None), MAPS) for n in QKV)
        )
    ]


def _branches(module: nn.Module) -> list[str]:
    """Names of a block's attentions and MLPs; empty if the module is no block."""
    mlps = (n for n, c in module.named_children() if n.startswith("mlp") and any(c.children()))
    return [*_attentions(module), *mlps]


def _refuse_unknown_attention(model: nn.Module, blocks: list[tuple[str, nn.Module]]) -> None:
    """Refuse a model with an attention of an unknown class, which would stay without updates."""
    known = {id(block.get_submodule(name)) for _, block in blocks for name in _attentions(block)}
    for path, module in model.named_modules():
        class_name = type(module).__name__
        if "Att" not in class_name or any(
            word in class_name for word in ("Block", "Partition", "Pool")
        ):
            continue
        if id(module) not in known:
            raise AttachError(
                f"{path} is a {'.'.join(class_of(module))}, an attention whose maps are not known: "
                f"only the methods linear and full support {type(model).__name__}."
            )


def _block_sites(model: nn.Module, path: str, block: nn.Module, index: int) -> Iterator[Site]:
    attentions = _attentions(block)
    if attentions:
        yield token_site(model, path, block.get_submodule(attentions[0]), index)
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
            yield replace(map_site(f"{path}.{name}", "other", child), refusal=refusal)


def _attention_sites(attention: nn.Module, path: str) -> Iterator[Site]:
    fused = [n for n, c in attention.named_children() if fused_parts(attention, n) and is_map(c)]
    for name in fused:
        yield from _fused_sites(attention, name, path)
    for name in ("q_bias", "v_bias"):
        vector = attention._parameters.get(name)
        if vector is not None:
            yield Site(f"{path}.{name}", name, path, name, (0, len(vector)), 1, True)
    yield from _linear_sites(attention, path, skip=tuple(fused))


def _fused_sites(attention: nn.Module, name: str, path: str) -> Iterator[Site]:
    """The sites of a whole fused map and of each of its parts."""
    fused, roles = attention.get_submodule(name), fused_parts(attention, name)
    assert isinstance(fused, MAPS)
    whole = map_site(f"{path}.{name}", "qkv", fused)
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
        if not is_map(module):
            refusal = f"{path}.{name} is a {type(module).__name__}, {SUBCLASS_REFUSAL}"
        elif role != "other" or name in OTHER_MAPS:
            refusal = ""
        yield replace(map_site(f"{path}.{name}", role, module), refusal=refusal)


def _outside_sites(model: nn.Module, sites: list[Site]) -> Iterator[Site]:
    """Linear maps outside the blocks: role ``other``, with a refusal unless in ``OTHER_MAPS``."""
    known = {site.module for site in sites}
    known |= {name.rpartition(".")[0] for name in classifier_names(model)}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path not in known and not _is_left_alone(path):
            refusal = f"{path} is a linear map outside the blocks with no known role."
            refusal = "" if any(part in OTHER_MAPS for part in path.split(".")) else refusal
            yield replace(map_site(path, "other", module), refusal=refusal)


def _refuse_tied(model: nn.Module, sites: list[Site]) -> list[Site]:
    """Refuse modules and tensors that are used twice: an update would reach only one use."""
    uses: Counter[int] = Counter()
    for module in model.modules():
        uses.update(id(child) for child in module._modules.values())
        uses.update(id(tensor) for tensor in module._parameters.values() if tensor is not None)
    checked = []
    for site in sites:
        owner = model.get_submodule(site.module)
        tied = max((uses[id(t)] for t in (owner, *owner.parameters(recurse=False))), default=0)
        refusal = f"{site.module} is used in {tied} places: an update would reach only one of them."
        checked.append(replace(site, refusal=refusal) if tied > 1 else site)
    return checked


def _is_left_alone(path: str) -> bool:
    return any(part in LEFT_ALONE for part in path.split("."))


def _reduction_sites(merging: nn.Module, path: str) -> Iterator[Site]:
    """Swin's patch merging. A norm before the map absorbs its shift if the map has no bias."""
    reduction, norm = merging.get_submodule("reduction"), getattr(merging, "norm", None)
    assert isinstance(reduction, nn.Linear)
    precedes = isinstance(norm, nn.LayerNorm) and norm.normalized_shape[0] == reduction.in_features
    site = map_site(f"{path}.reduction", "reduction", reduction)
    if precedes and reduction.bias is None:
        site = replace(site, bias=True, absorber=f"{path}.norm")
    yield site
    if isinstance(norm, nn.Module):
        yield output_site(f"{path}.norm", "reduction_norm", norm)


def _norm_sites(model: nn.Module, path: str) -> Iterator[Site]:
    """The norms at a path: one, several in a list, or none."""
    try:
        parent = model.get_submodule(path)
    except AttributeError:
        return
    for name, norm in parent.named_modules(prefix=path):
        if isinstance(norm._parameters.get("weight"), Tensor):
            is_batch = isinstance(norm, nn.modules.batchnorm._BatchNorm)
            yield output_site(name, "batch_norm" if is_batch else "norm", norm)


def _patch_sites(model: nn.Module, trunk: str) -> Iterator[Site]:
    """The site of the patch embedding's last layer."""
    paths = [f"{trunk}{embed}" for embed in ("patch_embed", "embeds")]
    modules = dict(model.named_modules())
    for path in (f"{p}.{name}" for p in paths for name in ("norm", "proj", "input_proj")):
        module = modules.get(path)
        if module is not None and module._parameters.get("weight") is not None:
            yield output_site(path, "patch", module)
            return
