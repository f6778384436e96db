"""A site: a place of a model that can take an update, and its role."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from aoft_deploy.tuning.updates.delta import Rows, matrix_shape

__all__ = [
    "LINEAR_ROLES",
    "MAPS",
    "NORM_ROLES",
    "SUBCLASS_REFUSAL",
    "Site",
    "is_map",
    "map_site",
    "output_site",
]


MAPS = (nn.Linear, nn.Conv2d)
"""Linear maps, and convolutions as linear maps of their (O·kh, I·kw) matrix."""


SUBCLASS_REFUSAL = "a subclass that may transform its weight before use."
"""Why a subclass of ``MAPS`` is refused, such as a convolution that standardises its weight."""


LINEAR_ROLES = ("q", "k", "v", "qkv", "proj", "gate", "fc1", "fc2", "reduction", "conv")
"""Roles of linear maps. ``fc1`` includes the gate of a gated MLP; ``qkv`` is a whole fused map."""


NORM_ROLES = ("norm", "reduction_norm", "batch_norm", "patch")
"""Roles of layers whose output channels can be scaled and shifted."""


@dataclass(frozen=True)
class Site:
    """One place that can take an update.

    Attributes:
        name: Unique name, which is part of a checkpoint's tensor names.
        role: One of ``LINEAR_ROLES``; ``other`` for a linear map of another role; ``q_bias`` or
            ``v_bias``; one of ``NORM_ROLES``; or ``block``.
        module: Path of the module that owns the tensors.
        tensor: Name of the module's weight; ``tokens`` for a block.
        rows: Rows of the weight matrix that belong to this site.
        in_features: Width of the input; 1 if the tensor is a vector; a block's token width.
        bias: Whether there is a bias to shift.
        part: Whether this is a part of a fused map. The whole map is another site.
        absorber: Path of the preceding norm, whose bias absorbs the shift if this layer has none.
        index: For a block: its position.
        patch: For a block: side of the patches in pixels.
        embed_dim: For a block: width of the patch embedding.
        windows: For a block: whether every window processes the prompts, which end in this block.
        kernel_height: Rows of the matrix per output channel.
        refusal: Why this site cannot take an update; empty if it can.
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
        """Number of output channels; a convolution's matrix has several rows per channel."""
        return self.out_features // self.kernel_height


def is_map(module: nn.Module) -> bool:
    """Whether a module only multiplies by its weight: a map, but not a subclass of one."""
    return type(module) in MAPS


def map_site(path: str, role: str, module: nn.Linear | nn.Conv2d) -> Site:
    """The site of a linear map, or of a convolution as the map of its (O·kh, I·kw) matrix."""
    rows, columns = matrix_shape(module.weight)
    site = Site(path, role, path, "weight", (0, rows), columns, module.bias is not None)
    return replace(site, kernel_height=rows // len(module.weight))


def output_site(path: str, role: str, module: nn.Module) -> Site:
    """The site of a module whose output channels can be scaled and shifted."""
    weight = module._parameters["weight"]
    assert weight is not None
    bias = module._parameters.get("bias") is not None
    return Site(path, role, path, "weight", (0, len(weight)), weight[0].numel(), bias)
