"""What an update changes in an affine map, and the three ways to use it.

A *delta* is the common form that every update's formula arrives at. It knows nothing of methods;
it knows how to be used:

``fold_``  puts the change into (weight, bias), in place. Differentiable, any dtype.
``apply``  is training's forward: the folded map, with gradients that never cost more than the
           update's own structure asks for.
``mix``    applies a different delta to every sample of a batch, around the one shared weight.

The laws: the three agree sample by sample, and a delta of zeros changes no bit of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Delta", "OutputDelta", "PromptDelta", "Rows", "WeightDelta", "matrix_shape"]

Rows = tuple[int, int]
"""First and one-past-last output row that a delta acts on."""


class Delta(Protocol):
    """The change that an update makes to x ↦ x Wᵀ + b."""

    def samples(self) -> int:
        """Length of the fields' first axis."""

    def __getitem__(self, index: Any) -> Self:
        """The delta of one task, or of several, picked along the leading axis."""

    @property
    def mixes_rows(self) -> bool:
        """Whether a row of the folded weight depends on other rows than its own."""

    def fold_(self, weight: Tensor, bias: Tensor | None, first: int = 0) -> None:
        """Put the change into W and b, or into a block of their rows that begins with ``first``.

        weight: (out, …) and bias: (out,) or None are changed in place, differentiably.
        """

    def mix(self, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """The changed map's output from its input x, its unchanged output y and W."""


class _Tensors:
    """Delta fields as a flat list of tensors, absent ones left out."""

    def __getitem__(self, index: Any) -> Self:
        """The delta of one task, or of several, picked along the fields' first axis."""
        return type(self)(**{n: getattr(self, n)[index] for n in self.names()})

    def samples(self) -> int:
        """Length of the fields' first axis."""
        first: Tensor = getattr(self, self.names()[0])
        return first.shape[0]

    def names(self) -> tuple[str, ...]:
        """Names of the fields that are present."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) is not None)  # type: ignore[arg-type]


@dataclass(frozen=True)
class WeightDelta(_Tensors):
    """A change beside the map: y = x Wᵀ + b + δ(x).

        ΔW = Σ_k left_kᵀ right_k + W ⊙ Σ_k gain_out_kᵀ gain_in_k,   ΔW_ii += diagonal_i (i < d),
        Δb = shift.

    Every field may carry leading task axes, which ``mix`` needs and ``fold`` does not take.

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
        """Every row changes by itself."""
        return False

    def after_map(self, residual: bool) -> OutputDelta:
        """The same change, made to the map's output: y ↦ y (+ y if residual) + y ΔWᵀ.

        Only for a square ΔW without gains; ``residual`` keeps y itself.
        """
        scale = None if residual else torch.full_like(self.right[..., 0, :], -1)  # type: ignore[index]
        if self.diagonal is not None:
            assert self.right is not None
            wide = F.pad(self.diagonal, (0, self.right.shape[-1] - self.diagonal.shape[-1]))
            scale = wide if scale is None else scale + wide
        return OutputDelta(scale=scale, left=self.left, right=self.right)

    def fold_(self, weight: Tensor, bias: Tensor | None, first: int = 0) -> None:
        """W += ΔW, b += Δb in the rows from ``first`` on.

        weight: (out, in), or a whole convolution's (O, I, kh, kw); bias: (out,).
        """
        weight = weight.view(matrix_shape(weight))
        rows = slice(first, first + len(weight))
        if self.gain_out is not None and self.gain_in is not None:
            weight.mul_(1 + self.gain_out[:, rows].mT @ self.gain_in)
        if self.left is not None and self.right is not None:
            weight.addmm_(self.left[:, rows].mT, self.right)
        if self.diagonal is not None and first < self.diagonal.shape[-1]:
            part = self.diagonal[rows]
            if torch.compiler.is_exporting():  # which loses writes into a diagonal
                d = part.shape[0]
                around = (first, weight.shape[1] - first - d, 0, weight.shape[0] - d)
                weight.add_(F.pad(torch.diag_embed(part), around))
            else:
                weight.diagonal(first)[: len(part)].add_(part)
        if self.shift is not None and bias is not None:
            bias.add_(self.shift[first : first + len(bias)])

    def mix(self, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """Y + δ(x) per sample.

        Args:
            x: Input of the map, (batch, tokens, in).
            y: Its unchanged output x Wᵀ + b, (batch, tokens, out).
            weight: W, (out, in), shared by all samples.

        Returns:
            (batch, tokens, out). Fields carry the leading axis ``batch``, or none at all.
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
class OutputDelta(_Tensors):
    """A change after the map: y ↦ y ⊙ (1 + scale) + Σ_k (y · right_k) left_k + shift.

    Folds into whatever made y: a linear map, a convolution, or (without left and right) a norm's
    affine.

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
        """Whether a row of the folded weight depends on other rows than its own."""
        return self.left is not None

    def fold_(self, weight: Tensor, bias: Tensor | None, first: int = 0) -> None:
        """Put the change into the rows from ``first`` on; into all at once if rows mix."""
        for tensor in (weight, bias):
            if tensor is None:
                continue
            mixed = None
            if self.left is not None and self.right is not None:
                matrix = tensor.reshape(len(tensor), -1).clone()
                mixed = (self.left.mT @ (self.right @ matrix)).view_as(tensor)
            if self.scale is not None:
                factor = 1 + self.scale[first : first + len(tensor)]
                tensor.mul_(factor.view(-1, *[1] * (tensor.dim() - 1)))
            if mixed is not None:
                tensor.add_(mixed)
        if self.shift is not None and bias is not None:
            bias.add_(self.shift[first : first + len(bias)])

    def mix(self, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """The changed y per sample. y: (batch, tokens, out); x and weight are not used."""
        result = y
        if self.scale is not None:
            result = torch.addcmul(y, y, self.scale[..., None, :].to(y.dtype))
        if self.left is not None and self.right is not None:
            result = result + (y @ self.right.mT.to(y.dtype)) @ self.left.to(y.dtype)
        return result if self.shift is None else result + self.shift[..., None, :].to(y.dtype)


@dataclass(frozen=True)
class PromptDelta(_Tensors):
    """Tokens put before a transformer block's own; they cannot be folded into a weight.

    Attributes:
        tokens: (..., prompts, width).
    """

    tokens: Tensor

    def before(self, x: Tensor, prefix: int) -> Tensor:
        """X with the prompts after its first ``prefix`` tokens (class token, registers).

        Args:
            x: (batch, tokens, width).
            prefix: Tokens that stay in front.

        Returns:
            (batch, tokens + prompts, width); each sample has its own prompts where ``tokens`` has
            a leading axis ``batch``.
        """
        prompts = self.tokens.to(x.dtype).expand(x.shape[0], *self.tokens.shape[-2:])
        return torch.cat([x[:, :prefix], prompts, x[:, prefix:]], dim=1)


def matrix_shape(weight: Tensor) -> tuple[int, int]:
    """Shape that methods see a weight in: (out, in), or (O·kh, I·kw) of a convolution.

    The convolution's is that of the published RLRR code, a plain view of (O, I, kh, kw).
    """
    if weight.dim() < 4:
        return weight.shape[0], weight[0].numel()
    return weight.shape[0] * weight.shape[2], weight.shape[1] * weight.shape[3]
