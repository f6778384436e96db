"""The kinds of update: a few trained numbers each, and the one formula that they stand for.

``formula`` maps the numbers to a ``Delta`` and is the only place where a method's mathematics
stands; training, merging and the many-task engine all call it. Parameters may carry leading task
axes, and the delta then carries them too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from aoft_deploy.errors import SettingError
from aoft_deploy.tuning.updates.delta import Delta, OutputDelta, PromptDelta, WeightDelta
from aoft_deploy.tuning.updates.orthogonal import factors, flip_first

__all__ = [
    "AoftAdapter",
    "AoftLowRank",
    "AoftPrompts",
    "LowRank",
    "LowRankAdapter",
    "Prompts",
    "Rescale",
    "ScaleShift",
    "Shift",
    "Update",
]


class Update(nn.Module, ABC):
    """Trained numbers of one site."""

    @abstractmethod
    def formula(self, **parameters: Tensor) -> Delta | PromptDelta:
        """The delta that these parameters stand for."""

    def kind(self) -> Hashable:
        """What two updates have in common if one call of ``formula`` can serve both, stacked."""
        plain = (bool, int, float, str, Aoft)
        constants = ((k, v) for k, v in vars(self).items() if isinstance(v, plain))
        return type(self), *constants, *((n, p.shape) for n, p in self.named_parameters())

    def delta(self) -> Delta | PromptDelta:
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


class LowRankAdapter(LowRank):
    """Adapter without activation on a map's output: y' = y + scale · y Aᵀ Bᵀ.

    The adapter of arXiv 1902.00751 has an activation, which forbids folding; arXiv 2410.22952
    removes it. Starts at zero.

    Args:
        features: Channels of the output.
        rank: Width of the bottleneck.
        scale: Fixed factor.
        generator: Source of A's randomness.
    """

    def __init__(self, features: int, rank: int, scale: float, generator: Generator) -> None:
        super().__init__(features, features, rank, scale, generator)

    def formula(self, a: Tensor, b: Tensor) -> OutputDelta:  # type: ignore[override]
        """The change of the output. a: (..., r, features), b: (..., features, r)."""
        return super().formula(a, b).after_map(residual=True)


@dataclass(frozen=True)
class Aoft:
    """The choices that every host of AOFT has.

    Attributes:
        rank: d, the columns of each AO matrix.
        scale: Fixed factor of the product.
        per_rank_scale: Train λ ∈ R^d (AOFT*).
        strict: Divide each vector by its norm first, so that AO(q) is exactly orthogonal.
        shared: One vector generates both projections of an adapter.
    """

    rank: int
    scale: float = 1.0
    per_rank_scale: bool = False
    strict: bool = False
    shared: bool = False


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
        options: Rank, scale and the rest.
        generator: Source of the vectors' randomness.
    """

    def __init__(
        self, in_features: int, out_features: int, options: Aoft, generator: Generator
    ) -> None:
        super().__init__()
        check_rank(options.rank, in_features, out_features)
        self.options = options
        self.q_down = nn.Parameter(_random_vector(in_features, generator))
        if not options.shared:
            self.q_up = nn.Parameter(_random_vector(out_features, generator))
        if options.per_rank_scale:
            self.rank_scale = nn.Parameter(torch.zeros(options.rank))

    def formula(  # type: ignore[override]
        self, q_down: Tensor, q_up: Tensor | None = None, rank_scale: Tensor | None = None
    ) -> WeightDelta:
        """The product of two AO matrices as a diagonal of d entries plus rank 2.

        With AO(q) = D_d − w v_dᵀ for each vector and Λ = scale · diag(λ):

            AO(q_down) Λ AO(q_up)ᵀ = D_d Λ D_dᵀ + (s w_down − D Λ v_up) w_upᵀ − w_down (D Λ v_down)ᵀ

        where s = v_downᵀ Λ v_up over the first d entries.

        Args:
            q_down: (..., in).
            q_up: (..., out), or None where q_down generates both.
            rank_scale: λ, (..., d), or None for ones.
        """
        d = self.options.rank
        w_down, v_down = factors(q_down, strict=self.options.strict)
        w_up, v_up = factors(q_down if q_up is None else q_up, strict=self.options.strict)
        ones = torch.ones_like(q_down[..., :d])
        lam = self.options.scale * (ones if rank_scale is None else rank_scale)
        scaled_up, scaled_down = lam * v_up[..., :d], lam * v_down[..., :d]
        s = (v_down[..., :d] * scaled_up).sum(-1, keepdim=True)
        right = s * w_down - _widen(flip_first(scaled_up), w_down.shape[-1])
        left = -_widen(flip_first(scaled_down), w_up.shape[-1])
        return WeightDelta(
            diagonal=lam,
            left=torch.stack([w_up, left], dim=-2),
            right=torch.stack([right, w_down], dim=-2),
        )


class AoftAdapter(AoftLowRank):
    """AOFT as an adapter on a map's output: y' = y + scale · y AO(q_down) diag(λ) AO(q_up)ᵀ.

    Without activation, so it folds. The published counts fit one vector for both projections at
    each of two sites or two vectors at one; the formula shows two, which is the default here.

    Args:
        features: N of both vectors.
        options: Rank, scale and the rest.
        residual: Keep y; without it y' is the product alone, of rank d.
        generator: Source of the vectors' randomness.
    """

    def __init__(self, features: int, options: Aoft, residual: bool, generator: Generator) -> None:
        super().__init__(features, features, options, generator)
        self.residual = residual

    def formula(  # type: ignore[override]
        self, q_down: Tensor, q_up: Tensor | None = None, rank_scale: Tensor | None = None
    ) -> OutputDelta:
        """The change of the output; arguments as for ``AoftLowRank``."""
        return super().formula(q_down, q_up, rank_scale).after_map(self.residual)


class Prompts(Update):
    """VPT (arXiv 2203.12119): trained tokens beside a block's own.

    Starts uniform in ±√(6 / (3 · patch² + embed_dim)), as the published code does.

    Args:
        width: Width of the tokens.
        rank: Number of prompts.
        patch: Side of the backbone's patches in pixels.
        generator: Source of the randomness.
        embed_dim: Width of the patch embedding, where a later stage's tokens are wider; 0 for
            ``width``.
    """

    def __init__(
        self, width: int, rank: int, patch: int, generator: Generator, embed_dim: int = 0
    ) -> None:
        super().__init__()
        bound = (6 / (3 * patch**2 + (embed_dim or width))) ** 0.5
        tokens = torch.empty(rank, width)
        self.tokens = nn.Parameter(tokens.uniform_(-bound, bound, generator=generator))

    def formula(self, tokens: Tensor) -> PromptDelta:  # type: ignore[override]
        """The prompts as they are. tokens: (..., prompts, width)."""
        return PromptDelta(tokens)


class AoftPrompts(Update):
    """AOFT as prompts: the columns of scale · AO(q) diag(λ) are the tokens.

    One vector generates all prompts of a block. λ starts at one: prompts of zero would change the
    attention too, so no start at the pre-trained function exists.

    Args:
        width: N, the width of the tokens.
        options: Rank is the number of prompts; ``shared`` means nothing here.
        generator: Source of the vector's randomness.
    """

    def __init__(self, width: int, options: Aoft, generator: Generator) -> None:
        super().__init__()
        check_rank(options.rank, width, width)
        self.options = options
        self.q = nn.Parameter(_random_vector(width, generator))
        if options.per_rank_scale:
            self.rank_scale = nn.Parameter(torch.ones(options.rank))

    def formula(self, q: Tensor, rank_scale: Tensor | None = None) -> PromptDelta:  # type: ignore[override]
        """The prompts. q: (..., width), rank_scale: λ, (..., prompts), or None for ones."""
        d, width = self.options.rank, q.shape[-1]
        w, v = factors(q, strict=self.options.strict)
        columns = flip_first(torch.eye(d, width, dtype=q.dtype, device=q.device))
        tokens = self.options.scale * (columns - v[..., :d, None] * w[..., None, :])
        return PromptDelta(tokens if rank_scale is None else rank_scale[..., None] * tokens)


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


def _random_vector(n: int, generator: Generator) -> Tensor:
    return torch.empty(n).normal_(0, n**-0.5, generator=generator)


def _widen(x: Tensor, n: int) -> Tensor:
    """X padded with zeros to n entries. (..., d) → (..., n)."""
    return nn.functional.pad(x, (0, n - x.shape[-1]))
