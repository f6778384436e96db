"""A site: a place of a model that takes an update, with its role."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from aoft_deploy.tuning.updates.delta import Rows, matrix_shape

__all__ = [
    "LINEAR_ROLES",
    "MAPS",
    "NORM_ROLES",
    "NOT_AS_IT_STANDS",
    "Site",
    "is_map",
    "map_site",
    "output_site",
]


MAPS = (nn.Linear, nn.Conv2d)
"""Layers that are linear maps, or convolutions seen as the map of their (O·kh, I·kw) matrix."""


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


def is_map(module: nn.Module) -> bool:
    """Whether a module multiplies by its weight and does nothing else."""
    return type(module) in MAPS


def map_site(path: str, role: str, module: nn.Linear | nn.Conv2d) -> Site:
    """A linear map, or a convolution as the map of its (O·kh, I·kw) matrix."""
    rows, columns = matrix_shape(module.weight)
    site = Site(path, role, path, "weight", (0, rows), columns, module.bias is not None)
    return replace(site, kernel_height=rows // len(module.weight))


def output_site(path: str, role: str, module: nn.Module) -> Site:
    """A module whose output channels can be scaled and shifted."""
    weight = module._parameters["weight"]
    assert weight is not None
    bias = module._parameters.get("bias") is not None
    return Site(path, role, path, "weight", (0, len(weight)), weight[0].numel(), bias)
