"""AO(q): its factors against the definition, and the definition against its laws."""

from __future__ import annotations

import pytest
import torch

from aoft_deploy import approximately_orthogonal
from aoft_deploy.errors import SettingError
from aoft_deploy.tuning.updates.orthogonal import (
    SINGULARITY_GUARD,
    factors,
    guarded,
)


def vector(n: int, norm: float, seed: int = 0) -> torch.Tensor:
    q = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    scaled: torch.Tensor = q * (norm / q.norm())
    return scaled


def entry_by_entry(q: torch.Tensor) -> torch.Tensor:
    """Q(q) computed by loops over entries, as in the paper; shares no code with the package."""
    n = len(q)
    matrix = torch.empty(n, n, dtype=q.dtype)
    for i in range(n):
        for j in range(n):
            if i == 0:
                matrix[i, j] = q[0] if j == 0 else -q[j]
            elif j == 0:
                matrix[i, j] = q[i]
            else:
                matrix[i, j] = float(i == j) - q[i] * q[j] / (1 + q[0])
    return matrix


@pytest.mark.parametrize("norm", [0.1, 1.0, 2.0])
@pytest.mark.parametrize("d", [1, 2, 5, 8])
def test_the_dense_form_is_the_papers_matrix_entry_by_entry(norm: float, d: int) -> None:
    q = vector(8, norm)
    assert torch.allclose(approximately_orthogonal(q, d), entry_by_entry(q)[:, :d], atol=1e-15)


@pytest.mark.parametrize("n", [2, 16, 768])
def test_columns_are_orthonormal_exactly_if_the_vector_has_unit_norm(n: int) -> None:
    matrix = approximately_orthogonal(vector(n, 1.0), n)
    assert torch.allclose(matrix.mT @ matrix, torch.eye(n, dtype=torch.float64), atol=1e-13)
    assert torch.linalg.det(matrix).item() == pytest.approx(1.0)
    loose = approximately_orthogonal(vector(n, 2.0), n)
    assert not torch.allclose(loose.mT @ loose, torch.eye(n, dtype=torch.float64), atol=1e-2)


def from_factors(q: torch.Tensor, d: int, strict: bool = False) -> torch.Tensor:
    """D[:, :d] − w v[:d]ᵀ."""
    w, v = factors(q, strict=strict)
    columns = torch.eye(len(q), d, dtype=q.dtype)
    columns[0, 0] = -1
    return columns - w[:, None] * v[None, :d]


@pytest.mark.parametrize("norm", [0.1, 1.0, 3.0])
@pytest.mark.parametrize(("n", "d"), [(12, 5), (64, 9)])
def test_the_factors_give_a_slice_minus_a_rank_one_term(n: int, d: int, norm: float) -> None:
    q = vector(n, norm)
    assert torch.allclose(from_factors(q, d), approximately_orthogonal(q, d), atol=1e-14)


@pytest.mark.parametrize("norm", [0.1, 1.0, 3.0])
@pytest.mark.parametrize(("n", "d"), [(8, 8), (64, 16), (768, 8)])
def test_strict_factors_have_orthonormal_columns_for_every_norm(
    n: int, d: int, norm: float
) -> None:
    q = vector(n, norm)
    matrix = from_factors(q, d, strict=True)
    assert (matrix.mT @ matrix - torch.eye(d, dtype=torch.float64)).abs().max() < 1e-13
    assert torch.allclose(matrix, approximately_orthogonal(q / q.norm(), d), atol=1e-14)


def test_strict_factors_of_a_zero_vector_are_finite() -> None:
    for factor in factors(torch.zeros(5), strict=True):
        assert factor.isfinite().all()


@pytest.mark.parametrize("strict", [False, True])
def test_gradients_of_the_factors_are_those_of_their_formula(strict: bool) -> None:
    q = vector(7, 1.3).requires_grad_()
    assert torch.autograd.gradcheck(lambda q: factors(q, strict=strict), (q,))


def test_leading_axes_are_independent_vectors() -> None:
    stacked = torch.stack([vector(6, 1.0, seed) for seed in range(3)])
    dense = approximately_orthogonal(stacked, 4)
    for one, matrix in zip(stacked, dense, strict=True):
        assert torch.equal(approximately_orthogonal(one, 4), matrix)


@pytest.mark.parametrize("q0", [-1.0, -1 + 1e-9, -1 - 1e-9])
def test_near_the_singularity_the_matrix_is_finite_and_equals_its_factors(q0: float) -> None:
    q = vector(8, 0.5)
    q[0] = q0
    q.requires_grad_()
    dense = approximately_orthogonal(q, 4)
    assert dense.isfinite().all()
    assert torch.allclose(from_factors(q, 4), dense, rtol=1e-10)
    torch.autograd.backward(dense.sum())
    assert q.grad is not None and q.grad.isfinite().all()


@pytest.mark.parametrize("d", [0, 9, -1])
def test_an_impossible_number_of_columns_is_refused(d: int) -> None:
    with pytest.raises(SettingError, match=f"d is {d}, but AO\\(q\\) of 8 entries has 1 to 8"):
        approximately_orthogonal(vector(8, 1.0), d)


@pytest.mark.parametrize("q0", [-1.0, -1 + 1e-9, -1 - 1e-9])
def test_the_guard_moves_the_first_entry_away_from_the_singularity_and_keeps_gradients(
    q0: float,
) -> None:
    q = vector(4, 0.5)
    q[0] = q0
    q.requires_grad_()
    moved = guarded(q)
    side = -1 if q0 < -1 else 1
    assert moved[0].item() + 1 == pytest.approx(side * SINGULARITY_GUARD, rel=1e-6)
    assert torch.equal(moved[1:], q[1:])
    torch.autograd.backward(moved.sum())
    assert q.grad is not None and torch.equal(q.grad, torch.ones(4, dtype=torch.float64))


def test_the_guard_does_not_move_other_vectors() -> None:
    q = vector(6, 1.0)
    assert torch.equal(guarded(q), q)
