"""SSF: a scale and a shift of a layer's output, or only a shift."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from aoft_deploy.tuning.updates.delta import OutputDelta
from aoft_deploy.tuning.updates.update import Update

__all__ = ["ScaleShift", "Shift"]


class ScaleShift(Update):
    """SSF (arXiv 2210.08823): y' = y ⊙ scale + shift.

    Args:
        features: Channels of the output.
        bias: Whether the layer has a bias, which takes the shift.
        std: Standard deviation of the initial values, scale ~ N(1, std) and shift ~ N(0, std). The
            published value is 0.02; with 0, training starts at the pre-trained function.
        generator: Random generator for the initial values.
    """

    def __init__(self, features: int, bias: bool, std: float, generator: Generator) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(features).normal_(1, std, generator=generator))
        if bias:
            self.shift = nn.Parameter(torch.empty(features).normal_(0, std, generator=generator))

    def formula(self, scale: Tensor, shift: Tensor | None = None) -> OutputDelta:  # type: ignore[override]
        """The delta y ⊙ (scale − 1) + shift. scale and shift: (..., features)."""
        return OutputDelta(scale=scale - 1, shift=shift)


class Shift(Update):
    """A trained shift: y' = y + shift.

    BitFit (arXiv 2106.10199) uses it for every bias; RLRR and SSF use it for biases that are
    parameters outside their linear layer.

    Args:
        features: Length of the vector.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(features))

    def formula(self, shift: Tensor) -> OutputDelta:  # type: ignore[override]
        """The delta shift, (..., features)."""
        return OutputDelta(shift=shift)
