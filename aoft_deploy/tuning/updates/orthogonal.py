"""The approximately orthogonal matrix AO(q) of AOFT (arXiv 2507.13260), and its structure.

For q ∈ R^N the paper's Q(q) ∈ R^{N×N} has

    first row  (q_0, −q_1, …, −q_{N−1}),   first column  (q_0, q_1, …, q_{N−1}),
    elsewhere  δ_ij − q_i q_j / (1 + q_0),

and AO(q) = Q[:, :d]. Q is a rotation exactly when ‖q‖ = 1; the paper does not enforce that.
With D = diag(−1, 1, …, 1),

    w = (1, q_1/(1+q_0), …, q_{N−1}/(1+q_0)),     v = (−(1+q_0), q_1, …, q_{N−1}),
    AO(q) = D[:, :d] − w v[:d]ᵀ,

so a product with AO(q) costs O(N + d) whatever d is. ``approximately_orthogonal`` writes the
definition out densely and serves as the oracle; everything else uses ``factors``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aoft_deploy.errors import SettingError

__all__ = ["approximately_orthogonal", "factors", "flip_first", "project", "project_back"]

SINGULARITY_GUARD = 1e-4
"""Q is singular at q_0 = −1: a q_0 closer to it than this is moved to this distance."""


def guarded(q: Tensor) -> Tensor:
    """The vector with q_0 kept away from −1. Gradients pass as if it had not been moved.

    Args:
        q: (..., N).

    Returns:
        (..., N).
    """
    distance = 1 + q[..., :1].detach()
    side = torch.where(distance < 0, -1.0, 1.0).to(q.dtype)
    move = side * (SINGULARITY_GUARD - distance.abs()).clamp(min=0)
    return torch.cat([q[..., :1] + move, q[..., 1:]], dim=-1)


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
    """The vectors w and v with AO(q) = D[:, :d] − w v[:d]ᵀ.

    Args:
        q: The generating vector, (..., N).
        strict: Take q/‖q‖ in place of q, so that AO(q)'s columns are exactly orthonormal.

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
    """D x: the first entry of the last axis changes its sign."""
    return torch.cat([-x[..., :1], x[..., 1:]], dim=-1)


def project(x: Tensor, q: Tensor, d: int) -> Tensor:
    """X AO(q) with one dot product per row.

    Args:
        x: (..., N).
        q: (N,).
        d: Number of columns.

    Returns:
        (..., d).
    """
    w, v = factors(q)
    return flip_first(x[..., :d]) - (x * w).sum(-1, keepdim=True) * v[..., :d]


def project_back(z: Tensor, q: Tensor) -> Tensor:
    """Z AO(q)ᵀ with one multiple of w added per row.

    Args:
        z: (..., d).
        q: (N,), d ≤ N.

    Returns:
        (..., N).
    """
    w, v = factors(q)
    d = z.shape[-1]
    padded = torch.nn.functional.pad(flip_first(z), (0, q.shape[-1] - d))
    return padded - (z * v[..., :d]).sum(-1, keepdim=True) * w
