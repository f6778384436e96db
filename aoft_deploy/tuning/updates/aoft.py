"""AOFT: low-rank products and prompts whose matrices AO(q) generates (arXiv 2507.13260)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from aoft_deploy.tuning.updates.delta import OutputDelta, PromptDelta, WeightDelta
from aoft_deploy.tuning.updates.orthogonal import factors, flip_first
from aoft_deploy.tuning.updates.update import Update, check_rank

__all__ = ["Aoft", "AoftAdapter", "AoftLowRank", "AoftPrompts"]


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


def _random_vector(n: int, generator: Generator) -> Tensor:
    return torch.empty(n).normal_(0, n**-0.5, generator=generator)


def _widen(x: Tensor, n: int) -> Tensor:
    """X padded with zeros to n entries. (..., d) → (..., n)."""
    return nn.functional.pad(x, (0, n - x.shape[-1]))
