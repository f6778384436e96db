"""The kinds of update: a few trained numbers each, and the one formula that they stand for.

``formula`` maps the numbers to a ``Delta`` and is the only place where a method's mathematics
stands; training, merging and the many-task engine all call it. Parameters may carry leading task
axes, and the delta then carries them too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from aoft_deploy.delta import Delta, OutputDelta, WeightDelta
from aoft_deploy.errors import SettingError
from aoft_deploy.orthogonal import factors, flip_first

__all__ = ["AoftLowRank", "LowRank", "Rescale", "ScaleShift", "Shift", "Update"]


class Update(nn.Module, ABC):
    """Trained numbers of one site."""

    @abstractmethod
    def formula(self, **parameters: Tensor) -> Delta:
        """The delta that these parameters stand for."""

    def delta(self) -> Delta:
        """The delta of this module's own parameters."""
        return self.formula(**dict(self.named_parameters()))


def check_rank(rank: int, in_features: int, out_features: int) -> None:
    """Refuse a rank that no (out, in) matrix can have."""
    limit = min(in_features, out_features)
    if not 1 <= rank <= limit:
        raise SettingError(
            f"rank is {rank}, but a {out_features} × {in_features} weight allows 1 to {limit}."
        )


class LowRank(Update):
    """LoRA (arXiv 2106.09685): ΔW = scale · B A.

    Starts at zero: A is Kaiming-uniform as in the reference implementation, B is zero.

    Args:
        in_features: Width of the map's input.
        out_features: Width of its output.
        rank: r, the rows of A.
        scale: Fixed factor (alpha / r).
        generator: Source of A's randomness.
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


class AoftLowRank(Update):
    """AOFT in LoRA's place (arXiv 2507.13260): ΔWᵀ = scale · AO(q_down) diag(λ) AO(q_up)ᵀ.

    One vector generates each projection, so the trained numbers do not grow with the rank d. With
    ``per_rank_scale`` this is AOFT*: λ ∈ R^d is trained and starts at zero, so training starts at
    the pre-trained function. Without it λ = 1 and no start at zero exists: ‖ΔW‖_F ≈ scale · √d for
    any q. The paper's initialisation of q is not known to us; here q ~ N(0, 1/N), about unit norm,
    where AO(q) is closest to orthogonal.

    Args:
        in_features: N of q_down.
        out_features: N of q_up.
        rank: d, the columns of both projections.
        scale: Fixed factor.
        per_rank_scale: Train λ (AOFT*).
        generator: Source of the vectors' randomness.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        scale: float,
        per_rank_scale: bool,
        generator: Generator,
    ) -> None:
        super().__init__()
        check_rank(rank, in_features, out_features)
        self.rank, self.scale = rank, scale
        self.q_down = nn.Parameter(_random_vector(in_features, generator))
        self.q_up = nn.Parameter(_random_vector(out_features, generator))
        if per_rank_scale:
            self.rank_scale = nn.Parameter(torch.zeros(rank))

    def formula(  # type: ignore[override]
        self, q_down: Tensor, q_up: Tensor, rank_scale: Tensor | None = None
    ) -> WeightDelta:
        """The product of two AO matrices as a diagonal of d entries plus rank 2.

        With AO(q) = D_d − w v_dᵀ for each vector and Λ = scale · diag(λ):

            AO(q_down) Λ AO(q_up)ᵀ = D_d Λ D_dᵀ + (s w_down − D Λ v_up) w_upᵀ − w_down (D Λ v_down)ᵀ

        where s = v_downᵀ Λ v_up over the first d entries.

        Args:
            q_down: (..., in).
            q_up: (..., out).
            rank_scale: λ, (..., d), or None for ones.
        """
        w_down, v_down = factors(q_down)
        w_up, v_up = factors(q_up)
        ones = torch.ones_like(q_down[..., : self.rank])
        lam = self.scale * (ones if rank_scale is None else rank_scale)
        scaled_up, scaled_down = lam * v_up[..., : self.rank], lam * v_down[..., : self.rank]
        s = (v_down[..., : self.rank] * scaled_up).sum(-1, keepdim=True)
        right = s * w_down - _widen(flip_first(scaled_up), w_down.shape[-1])
        left = -_widen(flip_first(scaled_down), w_up.shape[-1])
        return WeightDelta(
            diagonal=lam,
            left=torch.stack([w_up, left], dim=-2),
            right=torch.stack([right, w_down], dim=-2),
        )


class Rescale(Update):
    """RLRR (arXiv 2403.19067): W' = W + W ⊙ (scale_out scale_inᵀ), b' = b + shift.

    ``init="published"`` repeats the released code's Kaiming-uniform bounds, ±√6 for scale_out and
    ±√(6/in) for scale_in, and does not start at the pre-trained function. ``init="identity"`` keeps
    scale_in and starts scale_out at zero, which does.

    Args:
        in_features: Width of the map's input.
        out_features: Width of its output.
        rank: Number of scale pairs.
        bias: Whether the map has a bias to shift.
        init: How the scales start.
        generator: Source of the scales' randomness.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        init: Literal["published", "identity"],
        generator: Generator,
    ) -> None:
        super().__init__()
        check_rank(rank, in_features, out_features)
        bound_in, bound_out = (6 / in_features) ** 0.5, 6**0.5 if init == "published" else 0.0
        scale_in = torch.empty(rank, in_features)
        scale_out = torch.empty(rank, out_features)
        self.scale_in = nn.Parameter(scale_in.uniform_(-bound_in, bound_in, generator=generator))
        self.scale_out = nn.Parameter(
            scale_out.uniform_(-bound_out, bound_out, generator=generator)
        )
        if bias:
            self.shift = nn.Parameter(torch.zeros(out_features))

    def formula(  # type: ignore[override]
        self, scale_in: Tensor, scale_out: Tensor, shift: Tensor | None = None
    ) -> WeightDelta:
        """Gain scale_outᵀ scale_in and shift. scale_in: (..., r, in), scale_out: (..., r, out)."""
        return WeightDelta(gain_out=scale_out, gain_in=scale_in, shift=shift)


class ScaleShift(Update):
    """SSF (arXiv 2210.08823) on an output: y' = y ⊙ scale + shift.

    Args:
        features: Channels of the output.
        bias: Whether what makes the output has a bias to shift.
        init: ``"published"`` draws scale ~ N(1, 0.02) and shift ~ N(0, 0.02); ``"identity"`` starts
            at one and zero.
        generator: Source of the randomness.
    """

    def __init__(
        self,
        features: int,
        bias: bool,
        init: Literal["published", "identity"],
        generator: Generator,
    ) -> None:
        super().__init__()
        std = 0.02 if init == "published" else 0.0
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


def _random_vector(n: int, generator: Generator) -> Tensor:
    return torch.empty(n).normal_(0, n**-0.5, generator=generator)


def _widen(x: Tensor, n: int) -> Tensor:
    """X padded with zeros to n entries. (..., d) → (..., n)."""
    return nn.functional.pad(x, (0, n - x.shape[-1]))
