"""LoRA and adapters: a trained low-rank product beside a linear map, or after its output."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from aoft_deploy.tuning.updates.delta import OutputDelta, WeightDelta
from aoft_deploy.tuning.updates.update import Update, check_rank

__all__ = ["LowRank", "LowRankAdapter"]


class LowRank(Update):
    """LoRA (arXiv 2106.09685): ΔW = scale · B A.

    ΔW starts at zero: A is Kaiming-uniform as in the reference implementation, and B is zero.

    Args:
        in_features: Width of the map's input.
        out_features: Width of the map's output.
        rank: r, the number of rows of A.
        scale: Constant factor (alpha / r).
        generator: Random generator for A.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, scale: float, generator: Generator
    ) -> None:
        super().__init__()
        check_rank(rank, in_features, out_features)
        self.scale = scale
        bound = in_features**-0.5
        a = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
        self.a = nn.Parameter(a)
        self.b = nn.Parameter(torch.zeros(out_features, rank))

    def formula(self, a: Tensor, b: Tensor) -> WeightDelta:  # type: ignore[override]
        """ΔW = scale · b a. a: (..., r, in), b: (..., out, r)."""
        return WeightDelta(left=b.mT * self.scale, right=a)


class LowRankAdapter(LowRank):
    """Adapter without activation on a map's output: y' = y + scale · y Aᵀ Bᵀ.

    The adapter of arXiv 1902.00751 has an activation, so it cannot be folded; arXiv 2410.22952
    removes the activation. The change starts at zero.

    Args:
        features: Channels of the output.
        rank: Width of the bottleneck.
        scale: Constant factor.
        generator: Random generator for A.
    """

    def __init__(self, features: int, rank: int, scale: float, generator: Generator) -> None:
        super().__init__(features, features, rank, scale, generator)

    def formula(self, a: Tensor, b: Tensor) -> OutputDelta:  # type: ignore[override]
        """The change of the output. a: (..., r, features), b: (..., features, r)."""
        return super().formula(a, b).after_map(residual=True)
