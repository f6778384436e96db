"""Deltas: the change that an update makes to an affine map x ↦ x Wᵀ + b.

The formula of every update returns a delta. There are three ways to use one:

fold   Add the change to (weight, bias): ``fold_``, in place, differentiable, any dtype.
apply  Compute the map in training: ``applying.apply_linear`` folds the deltas and computes
       structured gradients.
mix    Compute the map for a batch in which every sample has its own delta: ``mix``.

Tests hold them to two laws: the three agree for every sample, and a delta of zeros changes no bit
of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Delta", "OutputDelta", "PromptDelta", "Rows", "WeightDelta", "matrix_shape"]

Rows = tuple[int, int]
"""Output rows that a delta changes: the first, and one past the last."""


class Delta(Protocol):
    """The change that an update makes to x ↦ x Wᵀ + b."""

    def samples(self) -> int:
        """Length of the fields' first axis."""

    def __getitem__(self, index: Any) -> Self:
        """The delta of one task, or of several, by index along the leading axis."""

    @property
    def mixes_rows(self) -> bool:
        """Whether folding needs all rows at once."""

    def fold_(self, weight: Tensor, bias: Tensor | None, first: int = 0) -> None:
        """Add the change to W and b in place, differentiably.

        Args:
            weight: (out, …), or a block of its rows.
            bias: (out,), or the same block of it, or None.
            first: Index of the block's first row.
        """

    def mix(self, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """The changed output, from the input x, the unchanged output y, and W."""


class _TensorFields:
    """Base of the deltas: a dataclass whose fields are optional tensors."""

    def __getitem__(self, index: Any) -> Self:
        """The delta of one task, or of several, by index along the fields' first axis."""
        return type(self)(**{n: getattr(self, n)[index] for n in self.names()})

    def samples(self) -> int:
        """Length of the fields' first axis."""
        field: Tensor = getattr(self, self.names()[0])
        return field.shape[0]

    def names(self) -> tuple[str, ...]:
        """Names of the fields that are not None."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) is not None)  # type: ignore[arg-type]


@dataclass(frozen=True)
class WeightDelta(_TensorFields):
    """A change of the weight and the bias: y = x (W + ΔW)ᵀ + b + Δb.

        ΔW = Σ_k left_kᵀ right_k + W ⊙ Σ_k gain_out_kᵀ gain_in_k,   ΔW_ii += diagonal_i (i < d),
        Δb = shift.

    The fields of a batch have a leading axis of samples, which ``mix`` uses and ``fold_`` does not
    accept.

    Attributes:
        diagonal: (..., d), d ≤ min(out, in).
        left: (..., r, out).
        right: (..., r, in).
        gain_out: (..., k, out).
        gain_in: (..., k, in).
        shift: (..., out); only for a map with a bias.
    """

    diagonal: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    gain_out: Tensor | None = None
    gain_in: Tensor | None = None
    shift: Tensor | None = None

    @property
    def mixes_rows(self) -> bool:
        """False: every row changes independently."""
        return False

    def after_map(self, residual: bool) -> OutputDelta:
        """The same product, applied to the map's output: y ↦ y + y ΔWᵀ, or y ΔWᵀ.

        ΔW must be square, without gains and shift.

        Args:
            residual: Whether to keep the term y.
        """
        scale = None if residual else torch.full_like(self.right[..., 0, :], -1)  # type: ignore[index]
        if self.diagonal is not None:
            assert self.right is not None
            wide = F.pad(self.diagonal, (0, self.right.shape[-1] - self.diagonal.shape[-1]))
            scale = wide if scale is None else scale + wide
        return OutputDelta(scale=scale, left=self.left, right=self.right)

    def fold_(self, weight: Tensor, bias: Tensor | None, first: int = 0) -> None:
        """W += ΔW and b += Δb in a block of rows.

        Args:
            weight: (rows, in), or all of a convolution's (O, I, kh, kw).
            bias: (rows,) or None.
            first: Index of the block's first row.
        """
        weight = weight.view(matrix_shape(weight))
        rows = slice(first, first + len(weight))
        if self.gain_out is not None and self.gain_in is not None:
            weight.mul_(1 + self.gain_out[:, rows].mT @ self.gain_in)
        if self.left is not None and self.right is not None:
            weight.addmm_(self.left[:, rows].mT, self.right)
        if self.diagonal is not None and first < self.diagonal.shape[-1]:
            part = self.diagonal[rows]
            if torch.compiler.is_exporting():  # export loses in-place writes to a diagonal
                d = part.shape[0]
                around = (first, weight.shape[1] - first - d, 0, weight.shape[0] - d)
                weight.add_(F.pad(torch.diag_embed(part), around))
            else:
                weight.diagonal(first)[: len(part)].add_(part)
        if self.shift is not None and bias is not None:
            bias.add_(self.shift[first : first + len(bias)])

    def mix(self, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """The map's output y + x ΔWᵀ + Δb for every sample.

        Args:
            x: Input of the map, (batch, tokens, in).
            y: Unchanged output x Wᵀ + b, (batch, tokens, out).
            weight: W, (out, in), shared by all samples.

        Returns:
            (batch, tokens, out). The fields have a leading axis ``batch``, or none.
        """
        if self.gain_out is not None and self.gain_in is not None:
            for k in range(self.gain_out.shape[-2]):
                scaled = F.linear(x * self.gain_in[..., k, None, :], weight)
                y = y + self.gain_out[..., k, None, :] * scaled
        if self.left is not None and self.right is not None:
            y = y + (x @ self.right.mT) @ self.left
        if self.diagonal is not None:
            d = self.diagonal.shape[-1]
            y = y + F.pad(x[..., :d] * self.diagonal[..., None, :], (0, y.shape[-1] - d))
        return y if self.shift is None else y + self.shift[..., None, :]


@dataclass(frozen=True)
class OutputDelta(_TensorFields):
    """A change of the output: y ↦ y ⊙ (1 + scale) + Σ_k (y · right_k) left_k + shift.

    It can be folded into the layer that computes y: a linear map, a convolution or, without left
    and right, the affine part of a norm.

    Attributes:
        scale: (..., out).
        left: (..., r, out).
        right: (..., r, out).
        shift: (..., out); only for a map with a bias.
    """

    scale: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    shift: Tensor | None = None

    @property
    def mixes_rows(self) -> bool:
        """Whether folding needs all rows at once."""
        return self.left is not None

    def fold_(self, weight: Tensor, bias: Tensor | None, first: int = 0) -> None:
        """Add the change to a block of rows of W and b; to all rows at once if ``mixes_rows``."""
        for tensor in (weight, bias):
            if tensor is None:
                continue
            low_rank = None
            if self.left is not None and self.right is not None:
                matrix = tensor.reshape(len(tensor), -1).clone()
                low_rank = (self.left.mT @ (self.right @ matrix)).view_as(tensor)
            if self.scale is not None:
                factor = 1 + self.scale[first : first + len(tensor)]
                tensor.mul_(factor.view(-1, *[1] * (tensor.dim() - 1)))
            if low_rank is not None:
                tensor.add_(low_rank)
        if self.shift is not None and bias is not None:
            bias.add_(self.shift[first : first + len(bias)])

    def mix(self, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """The changed y of every sample. y: (batch, tokens, out); x and weight are not used."""
        result = y
        if self.scale is not None:
            result = torch.addcmul(y, y, self.scale[..., None, :].to(y.dtype))
        if self.left is not None and self.right is not None:
            result = result + (y @ self.right.mT.to(y.dtype)) @ self.left.to(y.dtype)
        return result if self.shift is None else result + self.shift[..., None, :].to(y.dtype)


@dataclass(frozen=True)
class PromptDelta(_TensorFields):
    """Tokens that a transformer block processes beside its own. No weight can absorb them.

    Attributes:
        tokens: (..., prompts, width).
    """

    tokens: Tensor

    def before(self, x: Tensor, prefix: int) -> Tensor:
        """Insert the prompts into x after its first ``prefix`` tokens (class token, registers).

        Args:
            x: (batch, tokens, width).
            prefix: Number of tokens that stay in front.

        Returns:
            (batch, tokens + prompts, width). With a leading axis ``batch`` of ``self.tokens``,
            each sample gets its own prompts.
        """
        prompts = self.tokens.to(x.dtype).expand(x.shape[0], *self.tokens.shape[-2:])
        return torch.cat([x[:, :prefix], prompts, x[:, prefix:]], dim=1)


def matrix_shape(weight: Tensor) -> tuple[int, int]:
    """Shape of a weight as a matrix: (out, in), or (O·kh, I·kw) for a convolution.

    The convolution's matrix is a view of (O, I, kh, kw), as in the published RLRR code.
    """
    if weight.dim() < 4:
        return weight.shape[0], weight[0].numel()
    return weight.shape[0] * weight.shape[2], weight.shape[1] * weight.shape[3]
