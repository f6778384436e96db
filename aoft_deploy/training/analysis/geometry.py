"""Angles between vectors, spectral norms, and the deviation of AO(q) from orthogonality.

Everything is computed in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Generator, Tensor

from aoft_deploy.tuning.updates.delta import OutputDelta, WeightDelta
from aoft_deploy.tuning.updates.orthogonal import factors, flip_first

__all__ = [
    "BINS",
    "Angles",
    "angles",
    "ao_columns",
    "change_norm",
    "deviation",
    "random_density",
    "spectral_norm",
]

BINS = 361
"""Bins of a histogram over 0 to 180 degrees; odd, so that a right angle is the centre of a bin."""

MOST_PAIRS = 1_000_000
"""Largest number of pairs of vectors of a matrix; of more vectors, a random subset is used."""


def angles(vectors: Tensor, generator: Generator, most: int = MOST_PAIRS) -> Tensor:
    """The angle between every pair of vectors. Zero vectors are left out.

    Args:
        vectors: (count, length), one vector in each row.
        generator: Chooses the subset of vectors if there are too many pairs.
        most: Largest number of pairs.

    Returns:
        Degrees from 0 to 180, (pairs,), in float64.
    """
    vectors = vectors.double()
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    vectors = (vectors / norms)[norms[:, 0] > 0]
    count = (1 + math.isqrt(1 + 8 * most)) // 2  # the largest with count (count − 1) / 2 ≤ most
    if len(vectors) > count:
        vectors = vectors[torch.randperm(len(vectors), generator=generator)[:count]]
    first, second = torch.triu_indices(len(vectors), len(vectors), offset=1)
    cosines = (vectors @ vectors.mT)[first, second]
    return torch.rad2deg(torch.acos(cosines.clamp(-1, 1)))


def random_density(length: int, degrees: Tensor) -> Tensor:
    """Density, per degree, of the angle between independent random directions in R^length.

    It is ∝ sin^(length − 2), so long random vectors are nearly orthogonal.
    """
    log_norm = math.lgamma(length / 2) - math.lgamma((length - 1) / 2) - math.log(math.pi) / 2
    sines = torch.sin(torch.deg2rad(degrees))
    return math.exp(log_norm) * sines ** (length - 2) * (math.pi / 180)


@dataclass
class Angles:
    """Statistics of the angles between the vectors of one or several matrices.

    Attributes:
        matrices: Number of matrices.
        pairs: Number of angles.
        mean: Mean angle in degrees.
        sd: Standard deviation in degrees.
        farthest: Largest deviation from 90 degrees.
        counts: Histogram with ``BINS`` equal bins over 0 to 180 degrees.
        random: Expected histogram of independent random vectors of the same lengths.
    """

    matrices: int = 0
    pairs: int = 0
    mean: float = 0.0
    sd: float = 0.0
    farthest: float = 0.0
    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.int64))
    random: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))

    @classmethod
    def of(cls, vectors: Tensor, generator: Generator) -> Self:
        """Angles between vectors (count, length); empty with fewer than two nonzero vectors."""
        length = vectors.shape[-1]
        found = angles(vectors, generator)
        if not len(found) or length < 2:
            return cls()
        spread = (found - 90).abs().max().item()
        counts = torch.histc(found, BINS, 0, 180).long()
        random = len(found) * random_density(length, _bin_centres()) * (180 / BINS)
        mean, sd = found.mean().item(), found.std(correction=0).item()
        return cls(1, len(found), mean, sd, spread, counts, random)

    def __add__(self, other: Angles) -> Angles:
        """The angles of both."""
        pairs = self.pairs + other.pairs
        if not pairs:
            return self
        mean = (self.pairs * self.mean + other.pairs * other.mean) / pairs
        squares = sum(a.pairs * (a.sd**2 + (a.mean - mean) ** 2) for a in (self, other))
        return Angles(
            self.matrices + other.matrices,
            pairs,
            mean,
            math.sqrt(squares / pairs),
            max(self.farthest, other.farthest),
            self.counts + other.counts,
            self.random + other.random,
        )

    @property
    def random_sd(self) -> float:
        """Expected standard deviation for independent random vectors of these lengths."""
        share = self.random / self.random.sum()
        return math.sqrt((share * (_bin_centres() - 90) ** 2).sum().item())

    def summary(self) -> dict[str, float]:
        """The statistics as JSON values, without the histograms."""
        figures = {"pairs": self.pairs, "mean": self.mean, "sd": self.sd}
        return {**figures, "farthest_from_90": self.farthest, "random_sd": self.random_sd}


def _bin_centres() -> Tensor:
    """Centre of each bin in degrees."""
    return (torch.arange(BINS, dtype=torch.float64) + 0.5) * (180 / BINS)


def spectral_norm(matrix: Tensor) -> float:
    """‖M‖₂, the root of the largest eigenvalue of the smaller of M Mᵀ and Mᵀ M.

    Args:
        matrix: (rows, columns).
    """
    matrix = matrix.double()
    small = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    return float(torch.linalg.eigvalsh(small @ small.mT)[-1].clamp(min=0).sqrt())


def change_norm(delta: WeightDelta | OutputDelta, weight: Tensor) -> float:
    """‖ΔW‖₂ of the change that a delta makes to W.

    A ΔW of low rank is not formed: with the triangular factors of its two thin factors the product
    has the same norm. Otherwise ΔW is the difference of the folded weight and W.

    Args:
        delta: In float64, without task axes.
        weight: W, (out, in), float64.
    """
    thin = _thin_factors(delta, weight)
    if thin is None:
        folded = weight.clone()
        delta.fold_(folded, None)
        return spectral_norm(folded - weight)
    left, right = (torch.linalg.qr(factor, mode="r").R for factor in thin)
    return spectral_norm(left @ right.mT) if left.numel() else 0.0


def _thin_factors(delta: WeightDelta | OutputDelta, weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """L (out, k) and R (in, k) with ΔW = L Rᵀ; None unless k is well below the size of W."""
    is_output = isinstance(delta, OutputDelta)
    diagonal = delta.scale if isinstance(delta, OutputDelta) else delta.diagonal
    if isinstance(delta, WeightDelta) and delta.gain_out is not None:
        return None
    rows, columns = weight.shape
    inner = rows if is_output else columns
    left, right = weight.new_zeros(rows, 0), weight.new_zeros(inner, 0)
    if delta.left is not None and delta.right is not None:
        left, right = delta.left.mT, delta.right.mT
    if diagonal is not None:
        nonzero = diagonal.nonzero()[:, 0]
        if 2 * len(nonzero) >= min(rows, columns):
            return None
        units = torch.eye(len(nonzero), dtype=weight.dtype)
        left = torch.cat([weight.new_zeros(rows, len(nonzero)), left], dim=1)
        right = torch.cat([weight.new_zeros(inner, len(nonzero)), right], dim=1)
        left[nonzero, : len(nonzero)] = units * diagonal[nonzero]
        right[nonzero, : len(nonzero)] = units
    if 2 * left.shape[1] >= min(rows, columns):
        return None
    return (left, weight.mT @ right) if is_output else (left, right)


def ao_columns(q: Tensor, d: int, *, strict: bool = False) -> Tensor:
    """The dense matrix AO(q) = D[:, :d] − w v[:d]ᵀ. q: (N,), returns (N, d)."""
    w, v = factors(q, strict=strict)
    slice_ = flip_first(torch.eye(d, len(q), dtype=q.dtype)).mT
    return slice_ - w[:, None] * v[:d]


def deviation(q: Tensor, d: int, *, strict: bool = False) -> float:
    """The largest entry of |AO(q)ᵀ AO(q) − I|, without forming AO(q).

    With u = D[:, :d]ᵀ w and c = ½‖w‖² v − u, all over d entries, AOᵀAO − I = v cᵀ + c vᵀ.

    Args:
        q: The generating vector, (N,).
        d: Number of columns.
        strict: As for ``factors``; the deviation is then only rounding.
    """
    w, v = factors(q.double(), strict=strict)
    v = v[:d]
    c = (w @ w) / 2 * v - flip_first(w[:d])
    half = v[:, None] * c
    return float((half + half.mT).abs().max())
