"""RLRR: residual low-rank rescaling of a weight (arXiv 2403.19067)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Generator, Tensor, nn

from aoft_deploy.errors import SettingError
from aoft_deploy.tuning.updates.delta import WeightDelta
from aoft_deploy.tuning.updates.update import Update, check_rank

__all__ = ["Rescale"]


Init = Literal["published", "identity", "normal", "uniform", "constant", "zero"]


class Rescale(Update):
    """RLRR (arXiv 2403.19067): W' = W + W ⊙ (scale_out scale_inᵀ), b' = b + shift.

    How the scales start (the ablation, supplementary Table 10, does not say its spreads):

    ========== ===================================================================================
    published  Kaiming-uniform as in the released code: ±√6 for scale_out, ±√(6/in) for scale_in.
               Not at the pre-trained function.
    identity   the same scale_in and scale_out = 0: at the pre-trained function
    normal     N(0, 0.02) for both; uniform: within ±0.02; constant: 0.02
    zero       zeros; the product's gradient is zero there, so only ``shift`` learns
    ========== ===================================================================================

    Without ``residual`` W' = W ⊙ (scale_out scale_inᵀ), and the first pair starts at one plus the
    above. One-sided, the other scale is one. ``published`` has the product's bound 6/√in in both
    cases, since √6 alone would change the sign of rows.

    Args:
        in_features: Width of the map's input.
        out_features: Width of its output.
        rank: Number of scale pairs.
        shifts: Length of the map's bias, which is shifted; 0 where there is none.
        init: How the scales start.
        generator: Source of the scales' randomness.
        sides: ``both``, ``out`` (scale_out alone, the paper's left) or ``in`` (right).
        residual: Keep W beside the product.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        shifts: int,
        init: Init,
        generator: Generator,
        sides: Literal["both", "out", "in"] = "both",
        residual: bool = True,
    ) -> None:
        super().__init__()
        check_rank(rank, in_features, out_features)
        if sides != "both" and rank > 1:
            raise SettingError(f"rank is {rank}, but scales of one side alone have rank 1.")
        self.in_features, self.out_features, self.residual = in_features, out_features, residual
        bounds = {"in": (6 / in_features) ** 0.5, "out": 6**0.5}
        if sides != "both" or not residual:
            bounds = dict.fromkeys(bounds, 6 / in_features**0.5)
        for side, size in (("in", in_features), ("out", out_features)):
            if sides in ("both", side):
                at_rest = init == "identity" and (side == "out" or sides == "in")
                kind = "zero" if at_rest else init
                start = _scale_start(kind, (rank, size), bounds[side], generator)
                if not residual:
                    start[0] = 1 if init == "identity" else 1 + start[0]
                self.register_parameter(f"scale_{side}", nn.Parameter(start))
        if shifts:
            self.shift = nn.Parameter(torch.zeros(shifts))

    def formula(  # type: ignore[override]
        self,
        scale_in: Tensor | None = None,
        scale_out: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> WeightDelta:
        """Gain scale_outᵀ scale_in and shift. scale_in: (..., r, in), scale_out: (..., r, out)."""
        like = scale_in if scale_in is not None else scale_out
        assert like is not None
        ones_in = like.new_ones(*like.shape[:-2], 1, self.in_features)
        ones_out = like.new_ones(*like.shape[:-2], 1, self.out_features)
        gain_in = ones_in if scale_in is None else scale_in
        gain_out = ones_out if scale_out is None else scale_out
        if not self.residual:
            gain_in = torch.cat([gain_in, ones_in], dim=-2)
            gain_out = torch.cat([gain_out, -ones_out], dim=-2)
        return WeightDelta(gain_out=gain_out, gain_in=gain_in, shift=shift)


def _scale_start(init: str, shape: tuple[int, int], bound: float, generator: Generator) -> Tensor:
    scale = torch.zeros(shape)
    if init in ("published", "identity"):
        return scale.uniform_(-bound, bound, generator=generator)
    if init == "normal":
        return scale.normal_(0, 0.02, generator=generator)
    if init == "uniform":
        return scale.uniform_(-0.02, 0.02, generator=generator)
    return scale.fill_(0.02 if init == "constant" else 0.0)
