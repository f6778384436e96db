"""Where updates go in a timm model: its linear maps, norms and patch embedding, by role.

A fused qkv linear is three sites, one for each third of its rows, because its methods treat q, k
and v apart. That needs to know how the rows are laid out, so fused attention is taken only from
classes whose layout is known; any other is named in the error instead of guessed at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from aoft_deploy.delta import Rows
from aoft_deploy.errors import AttachError

__all__ = ["LINEAR_ROLES", "Site", "classifier_names", "find_sites"]

FUSED_QKV = {
    ("timm.layers.attention", "Attention"),
    ("timm.layers.attention", "AttentionRope"),
    ("timm.models.beit", "Attention"),
    ("timm.models.eva", "EvaAttention"),
    ("timm.models.vision_transformer_relpos", "RelPosAttention"),
}
"""Attention classes whose fused qkv rows are (q, k, v), each (heads, head width)."""

LINEAR_ROLES = ("q", "k", "v", "proj", "gate", "fc1", "fc2")
"""Roles of linear maps inside a block. fc1 includes the gate of a gated MLP."""

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


@dataclass(frozen=True)
class Site:
    """One place that can take an update.

    Attributes:
        name: Unique name, part of a checkpoint's tensor names.
        role: One of ``LINEAR_ROLES``, ``"q_bias"``, ``"v_bias"``, ``"norm"`` or ``"patch"``.
        module: Path of the module that owns the tensors.
        tensor: Name of the tensor in it that plays the weight.
        rows: Output rows that belong to this site.
        in_features: Width of the input; 1 where the tensor is a vector.
        bias: Whether there is a bias to shift.
    """

    name: str
    role: str
    module: str
    tensor: str
    rows: Rows
    in_features: int
    bias: bool

    @property
    def out_features(self) -> int:
        """Number of output rows."""
        return self.rows[1] - self.rows[0]


def find_sites(model: nn.Module) -> list[Site]:
    """All sites of a timm transformer, in the order of its modules.

    Args:
        model: A plain timm model.

    Returns:
        Sites of every block's attention and MLP linears and norms, of the final norm and of the
        patch embedding.

    Raises:
        AttachError: The model has no transformer blocks, a block's linear map has no known role, or
            its fused qkv has a layout that is not known.
    """
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
    for name, block in blocks:
        sites += _norm_sites(block, name, ("norm1", "norm2"))
        sites += _attention_sites(block.get_submodule("attn"), f"{name}.attn")
        sites += _linear_sites(block.get_submodule("mlp"), f"{name}.mlp")
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


def _attention_sites(attention: nn.Module, path: str) -> Iterator[Site]:
    fused = getattr(attention, "qkv", None)
    if fused is not None:
        yield from _fused_sites(attention, fused, path)
    for name in ("q_bias", "v_bias"):
        vector = attention._parameters.get(name)
        if vector is not None:
            yield Site(f"{path}.{name}", name, path, name, (0, len(vector)), 1, True)
    yield from _linear_sites(attention, path, skip="qkv")


def _fused_sites(attention: nn.Module, fused: nn.Module, path: str) -> Iterator[Site]:
    cls = type(attention)
    if (cls.__module__, cls.__name__) not in FUSED_QKV or not isinstance(fused, nn.Linear):
        raise AttachError(
            f"{path} is a {cls.__module__}.{cls.__name__}, whose fused qkv layout is not known: "
            "only linear probing can be attached to this model."
        )
    width = fused.out_features // 3
    for i, role in enumerate("qkv"):
        rows = (i * width, (i + 1) * width)
        yield _linear_site(f"{path}.qkv.{role}", role, f"{path}.qkv", fused, rows)


def _linear_sites(parent: nn.Module, path: str, skip: str = "") -> Iterator[Site]:
    for name, module in parent.named_modules():
        if isinstance(module, nn.Linear) and name != skip:
            full = f"{path}.{name}"
            role = LEAF_ROLES.get(name.rpartition(".")[2])
            if role is None:
                raise AttachError(f"{full} is a linear map with no known role in a block.")
            yield _linear_site(full, role, full, module, (0, module.out_features))


def _linear_site(name: str, role: str, path: str, linear: nn.Linear, rows: Rows) -> Site:
    return Site(name, role, path, "weight", rows, linear.in_features, linear.bias is not None)


def _norm_sites(parent: nn.Module, path: str, names: tuple[str, ...]) -> Iterator[Site]:
    for name in names:
        norm = getattr(parent, name, None)
        if isinstance(norm, nn.Module) and isinstance(norm._parameters.get("weight"), Tensor):
            yield _output_site(f"{path}.{name}".lstrip("."), "norm", norm)


def _patch_sites(model: nn.Module) -> Iterator[Site]:
    embed = getattr(model, "patch_embed", None)
    last = getattr(embed, "norm", None)
    if isinstance(last, nn.Module) and last._parameters.get("weight") is not None:
        yield _output_site("patch_embed.norm", "patch", last)
    elif isinstance(getattr(embed, "proj", None), (nn.Conv2d, nn.Linear)):
        yield _output_site("patch_embed.proj", "patch", embed.proj)  # type: ignore[union-attr]


def _output_site(path: str, role: str, module: nn.Module) -> Site:
    weight = module._parameters["weight"]
    assert weight is not None
    bias = module._parameters.get("bias") is not None
    return Site(path, role, path, "weight", (0, len(weight)), weight[0].numel(), bias)
