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

    Initial values of the scales (the ablation, supplementary Table 10, does not give its standard
    deviations and bounds):

    ========== ===================================================================================
    published  Kaiming-uniform as in the released code: ±√6 for scale_out, ±√(6/in) for scale_in.
               Training does not start at the pre-trained function.
    identity   scale_in as in ``published``, scale_out = 0: training starts at the pre-trained
               function
    normal     N(0, 0.02) for both scales
    uniform    uniform in ±0.02 for both scales
    constant   0.02 for both scales
    zero       zeros; the product's gradient is zero there, so only ``shift`` learns
    ========== ===================================================================================

    Without ``residual``, W' = W ⊙ (scale_out scale_inᵀ), and the first pair starts at one plus
    these values. With one side only, the other scale is one. In both cases ``published`` uses the
    product's bound 6/√in, because the bound √6 would change the sign of rows.

    Args:
        in_features: Width of the map's input.
        out_features: Width of the map's output.
        rank: Number of scale pairs.
        shifts: Length of the map's bias, which is shifted; 0 if there is none.
        init: Initial values of the scales.
        generator: Random generator for the scales.
        sides: ``both``, ``out`` (only scale_out, the paper's left) or ``in`` (only scale_in,
            right).
        residual: Whether to keep the term W.
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
            raise SettingError(f"rank is {rank}, but the scales of a single side have rank 1.")
        self.in_features, self.out_features, self.residual = in_features, out_features, residual
        bounds = {"in": (6 / in_features) ** 0.5, "out": 6**0.5}
        if sides != "both" or not residual:
            bounds = dict.fromkeys(bounds, 6 / in_features**0.5)
        for side, size in (("in", in_features), ("out", out_features)):
            if sides in ("both", side):
                is_zero = init == "identity" and (side == "out" or sides == "in")
                start = _initial_scale(
                    "zero" if is_zero else init, (rank, size), bounds[side], generator
                )
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
        """ΔW = W ⊙ (scale_outᵀ scale_in), minus W without ``residual``; Δb = shift.

        Args:
            scale_in: (..., r, in), or None for ones.
            scale_out: (..., r, out), or None for ones.
            shift: (..., out), or None for zeros.
        """
        scale = scale_in if scale_in is not None else scale_out
        assert scale is not None
        ones_in = scale.new_ones(*scale.shape[:-2], 1, self.in_features)
        ones_out = scale.new_ones(*scale.shape[:-2], 1, self.out_features)
        gain_in = ones_in if scale_in is None else scale_in
        gain_out = ones_out if scale_out is None else scale_out
        if not self.residual:
            gain_in = torch.cat([gain_in, ones_in], dim=-2)
            gain_out = torch.cat([gain_out, -ones_out], dim=-2)
        return WeightDelta(gain_out=gain_out, gain_in=gain_in, shift=shift)


def _initial_scale(init: str, shape: tuple[int, int], bound: float, generator: Generator) -> Tensor:
    scale = torch.zeros(shape)
    if init in ("published", "identity"):
        return scale.uniform_(-bound, bound, generator=generator)
    if init == "normal":
        return scale.normal_(0, 0.02, generator=generator)
    if init == "uniform":
        return scale.uniform_(-0.02, 0.02, generator=generator)
    return scale.fill_(0.02 if init == "constant" else 0.0)
