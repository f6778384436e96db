"""SSF: a scale and a shift after a layer, and the shift alone."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from aoft_deploy.tuning.updates.delta import OutputDelta
from aoft_deploy.tuning.updates.update import Update

__all__ = ["ScaleShift", "Shift"]


class ScaleShift(Update):
    """SSF (arXiv 2210.08823) on an output: y' = y ⊙ scale + shift.

    Args:
        features: Channels of the output.
        bias: Whether what makes the output has a bias to shift.
        std: Spread of the start, scale ~ N(1, std) and shift ~ N(0, std); the published one is 0.02
            and 0 starts at the pre-trained function.
        generator: Source of the randomness.
    """

    def __init__(self, features: int, bias: bool, std: float, generator: Generator) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(features).normal_(1, std, generator=generator))
        if bias:
            self.shift = nn.Parameter(torch.empty(features).normal_(0, std, generator=generator))

    def formula(self, scale: Tensor, shift: Tensor | None = None) -> OutputDelta:  # type: ignore[override]
        """Scale and shift. Both (..., features)."""
        return OutputDelta(scale=scale - 1, shift=shift)


class Shift(Update):
    """A trained vector added to a frozen one, for biases that stand outside their linear layer.

    Args:
        features: Length of the vector.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(features))

    def formula(self, shift: Tensor) -> OutputDelta:  # type: ignore[override]
        """The shift alone. (..., features)."""
        return OutputDelta(shift=shift)
