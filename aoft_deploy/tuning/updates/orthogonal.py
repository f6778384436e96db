"""The approximately orthogonal matrix AO(q) of AOFT (arXiv 2507.13260), and its structure.

For q ∈ R^N the paper's Q(q) ∈ R^{N×N} has

    first row  (q_0, −q_1, …, −q_{N−1}),   first column  (q_0, q_1, …, q_{N−1}),
    elsewhere  δ_ij − q_i q_j / (1 + q_0),

and AO(q) = Q[:, :d]. Q is a rotation exactly if ‖q‖ = 1, which the paper does not enforce.
With D = diag(−1, 1, …, 1),

    w = (1, q_1/(1+q_0), …, q_{N−1}/(1+q_0)),     v = (−(1+q_0), q_1, …, q_{N−1}),
    AO(q) = D[:, :d] − w v[:d]ᵀ,

so a product with AO(q) costs O(N + d) instead of O(N d). ``approximately_orthogonal`` computes the
dense matrix by its definition, as a reference for tests; all updates use ``factors``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aoft_deploy.errors import SettingError

__all__ = ["approximately_orthogonal", "factors", "flip_first"]

SINGULARITY_GUARD = 1e-4
"""Smallest allowed distance of q_0 from −1, where Q is singular."""


def approximately_orthogonal(q: Tensor, d: int) -> Tensor:
    """The dense AO(q), entry by entry as the paper defines it.

    Args:
        q: The generating vector, (..., N).
        d: Number of columns, 1 ≤ d ≤ N.

    Returns:
        AO(q), (..., N, d); its columns are orthonormal when ‖q‖ = 1.

    Raises:
        SettingError: d is outside 1..N.
    """
    n = q.shape[-1]
    if not 1 <= d <= n:
        raise SettingError(f"d is {d}, but AO(q) of {n} entries has 1 to {n} columns.")
    q = guarded(q)
    matrix = torch.eye(n, dtype=q.dtype, device=q.device).expand(*q.shape[:-1], n, n)
    matrix = matrix - q[..., :, None] * q[..., None, :] / (1 + q[..., :1, None])
    first_row = torch.cat([q[..., :1], -q[..., 1:]], dim=-1)
    matrix = torch.cat([q[..., :, None], matrix[..., :, 1:]], dim=-1)
    matrix = torch.cat([first_row[..., None, :], matrix[..., 1:, :]], dim=-2)
    return matrix[..., :, :d]


def factors(q: Tensor, *, strict: bool = False) -> tuple[Tensor, Tensor]:
    """The vectors w and v of AO(q) = D[:, :d] − w v[:d]ᵀ.

    Args:
        q: The generating vector, (..., N).
        strict: Use q/‖q‖ instead of q, which makes the columns of AO(q) exactly orthonormal.

    Returns:
        (w, v), each (..., N).
    """
    if strict:
        q = q / torch.linalg.vector_norm(q, dim=-1, keepdim=True).clamp(min=1e-12)
    q = guarded(q)
    one_plus, tail = 1 + q[..., :1], q[..., 1:]
    w = torch.cat([torch.ones_like(one_plus), tail / one_plus], dim=-1)
    v = torch.cat([-one_plus, tail], dim=-1)
    return w, v


def flip_first(x: Tensor) -> Tensor:
    """D x: negate the first entry of the last axis."""
    return torch.cat([-x[..., :1], x[..., 1:]], dim=-1)


def guarded(q: Tensor) -> Tensor:
    """The vector q with |1 + q_0| of at least ``SINGULARITY_GUARD``.

    Moving q_0 does not change the gradients.

    Args:
        q: (..., N).

    Returns:
        (..., N).
    """
    distance = 1 + q[..., :1].detach()
    side = torch.where(distance < 0, -1.0, 1.0).to(q.dtype)
    move = side * (SINGULARITY_GUARD - distance.abs()).clamp(min=0)
    return torch.cat([q[..., :1] + move, q[..., 1:]], dim=-1)
