"""Angles, norms and deviations, compared with their dense definitions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from aoft_deploy import approximately_orthogonal
from aoft_deploy.training.analysis.geometry import (
    BINS,
    Angles,
    angles,
    ao_columns,
    change_norm,
    deviation,
    random_density,
    spectral_norm,
)
from aoft_deploy.tuning.updates.delta import OutputDelta, WeightDelta

OUT, IN = 24, 20


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator(seed))


def test_angles_are_those_of_every_pair() -> None:
    vectors = random(7, 5)
    expected = [
        math.degrees(math.acos(float(a @ b / (a.norm() * b.norm()))))
        for a, b in itertools.combinations(vectors, 2)
    ]
    assert angles(vectors, generator()).tolist() == pytest.approx(expected)


def test_equal_and_opposite_vectors_are_0_and_180_degrees_apart() -> None:
    vectors = torch.tensor([[1.0, 2.0, 3.0], [0.1, 0.2, 0.3], [-1.0, -2.0, -3.0]])
    assert angles(vectors, generator()).tolist() == pytest.approx([0, 180, 180], abs=1e-4)


def test_a_vector_of_zeros_has_no_angle() -> None:
    vectors = random(4, 5)
    with_zeros = torch.cat([torch.zeros(1, 5), vectors, torch.zeros(2, 5)])
    assert torch.equal(angles(with_zeros, generator()), angles(vectors, generator()))


@pytest.mark.parametrize(("most", "pairs"), [(1, 1), (2, 1), (3, 3), (9, 6), (10, 10), (11, 10)])
def test_of_too_many_pairs_those_of_random_vectors_are_taken(most: int, pairs: int) -> None:
    vectors = random(9, 5)
    every = set(angles(vectors, generator()).tolist())
    some = angles(vectors, generator(1), most)
    assert len(some) == pairs
    assert all(any(math.isclose(a, b) for b in every) for a in some.tolist())
    assert torch.equal(some, angles(vectors, generator(1), most))


@pytest.mark.parametrize("length", [2, 3, 16, 768])
def test_the_density_of_random_directions_is_what_random_directions_have(length: int) -> None:
    found = Angles.of(random(800, length), generator())
    middles = (torch.arange(BINS, dtype=torch.float64) + 0.5) * (180 / BINS)
    density = random_density(length, middles)
    assert density.sum() * (180 / BINS) == pytest.approx(1, abs=1e-5)
    assert found.random.sum() == pytest.approx(found.pairs, rel=1e-5)
    assert found.sd == pytest.approx(found.random_sd, rel=0.02)
    assert (found.counts - found.random).abs().sum() < 0.1 * found.pairs


def test_angles_of_several_matrices_are_those_of_all_pairs_together() -> None:
    parts = [random(6, 4), random(5, 9, seed=1), 1 + random(7, 3, seed=2)]
    whole = sum((Angles.of(part, generator()) for part in parts), Angles())
    every = torch.cat([angles(part, generator()) for part in parts])
    assert (whole.matrices, whole.pairs) == (3, len(every))
    assert whole.mean == pytest.approx(every.mean().item())
    assert whole.sd == pytest.approx(every.std(correction=0).item())
    assert whole.farthest == pytest.approx((every - 90).abs().max().item())
    assert torch.equal(whole.counts, torch.histc(every, BINS, 0, 180).long())


@pytest.mark.parametrize("shape", [(1, 5), (5, 1)], ids=["one vector", "vectors of one number"])
def test_there_are_no_angles_between_fewer_than_two_vectors(shape: tuple[int, int]) -> None:
    none = Angles.of(random(*shape), generator())
    assert (none.matrices, none.pairs) == (0, 0)
    assert (none + none).pairs == 0
    some = Angles.of(random(4, 5), generator())
    assert (none + some).summary() == pytest.approx(some.summary())


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (1, 4), (4, 1)], ids=str)
def test_the_spectral_norm_is_the_largest_singular_value(shape: tuple[int, int]) -> None:
    matrix = random(*shape)
    assert spectral_norm(matrix) == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)))
    assert spectral_norm(torch.zeros(shape)) == 0


def changes(size: int) -> dict[str, WeightDelta | OutputDelta]:
    """Deltas of every form; ``size`` is the length of diagonals."""
    left, right = random(2, OUT, seed=1), random(2, IN, seed=2)
    scale = torch.nn.functional.pad(random(size, seed=3), (0, OUT - size))
    after = {"left": left, "right": random(2, OUT, seed=4)}
    return {
        "low rank": WeightDelta(left=left, right=right),
        "diagonal and low rank": WeightDelta(random(size, seed=3), left, right),
        "gains": WeightDelta(gain_out=left, gain_in=right),
        "shift": WeightDelta(shift=random(OUT)),
        "output": OutputDelta(scale=random(OUT)),
        "output's shift": OutputDelta(shift=random(OUT)),
        "output of low rank": OutputDelta(**after),
        "output with diagonal": OutputDelta(scale, **after),
        "output without residual": OutputDelta(scale - 1, **after),
    }


@pytest.mark.parametrize("size", [1, 4, 8, IN])
@pytest.mark.parametrize("name", changes(1))
def test_the_norm_of_a_change_is_that_of_the_dense_difference(name: str, size: int) -> None:
    delta, weight = changes(size)[name], random(OUT, IN, seed=5)
    folded = weight.clone()
    delta.fold_(folded, None)
    expected = float(torch.linalg.matrix_norm(folded - weight, 2))
    assert change_norm(delta, weight) == pytest.approx(expected, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("name", ["low rank", "diagonal and low rank", "output with diagonal"])
def test_a_change_of_low_rank_is_not_formed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WeightDelta, "fold_", None)
    monkeypatch.setattr(OutputDelta, "fold_", None)
    assert change_norm(changes(4)[name], random(OUT, IN)) > 0


@pytest.mark.parametrize("strict", [False, True], ids=["approximate", "strict"])
@pytest.mark.parametrize("d", [1, 2, 7, 16])
@pytest.mark.parametrize("scale", [0.0, 0.1, 0.5, 2.0])
def test_the_deviation_is_that_of_the_dense_matrix(scale: float, d: int, strict: bool) -> None:
    q = scale * random(16)
    used = q / q.norm() if strict and scale else q
    dense = approximately_orthogonal(used, d)
    expected = (dense.mT @ dense - torch.eye(d, dtype=torch.float64)).abs().max()
    assert deviation(q, d, strict=strict) == pytest.approx(float(expected), abs=1e-12)
    assert torch.allclose(ao_columns(q, d, strict=strict), dense, atol=1e-12)
    if strict and scale:
        assert deviation(q, d, strict=True) < 1e-12


def test_near_the_singularity_the_deviation_is_that_of_the_guarded_matrix() -> None:
    q = torch.tensor([-1.0, 0.3, 0.2], dtype=torch.float64)
    dense = approximately_orthogonal(q, 2)
    expected = float((dense.mT @ dense - torch.eye(2, dtype=torch.float64)).abs().max())
    assert expected > 1e3
    assert deviation(q, 2) == pytest.approx(expected, rel=1e-6)
