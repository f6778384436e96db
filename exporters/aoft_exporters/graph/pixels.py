"""Fold the normalisation of uint8 pixels into the patch embedding."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from aoft_deploy.artefacts.spec import InputSpec
from aoft_deploy.errors import AttachError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["pixel_model"]


def pixel_model(model: nn.Module, images: InputSpec) -> nn.Module:
    """A copy of a model that takes uint8 pixels, [batch, H, W, 3].

    Raises:
        AttachError: The model has no unpadded patch embedding.
    """
    import torch
    from torch import nn

    projection = getattr(getattr(model, "patch_embed", None), "proj", None)
    if not isinstance(projection, nn.Conv2d) or any(projection.padding):
        raise AttachError(
            "`uint8` folds normalisation into an unpadded patch embedding, which "
            f"{type(model).__name__} does not have: leave it out."
        )
    model = copy.deepcopy(model)
    weight = projection.weight.detach().double()
    mean = torch.tensor(images.mean, dtype=torch.float64).view(1, 3, 1, 1)
    std = torch.tensor(images.std, dtype=torch.float64).view(1, 3, 1, 1)
    bias = -(weight * (mean / std)).sum((1, 2, 3))
    if projection.bias is not None:
        bias = bias + projection.bias.detach().double()
    copied: Any = model.get_submodule("patch_embed.proj")
    copied.weight = nn.Parameter((weight / (255 * std)).float(), requires_grad=False)
    copied.bias = nn.Parameter(bias.float(), requires_grad=False)

    class PixelModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(image.permute(0, 3, 1, 2).float())
            return logits

    return PixelModel().eval()
