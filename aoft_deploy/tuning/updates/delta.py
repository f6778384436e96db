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

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "Delta",
    "OutputDelta",
    "PromptDelta",
    "Rows",
    "WeightDelta",
    "apply_linear",
    "fold_rows",
    "matrix_shape",
]

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


def fold_rows(
    weight: Tensor, bias: Tensor | None, deltas: Sequence[tuple[Rows, Delta]]
) -> tuple[Tensor, Tensor | None]:
    """Fold several deltas, each into its own rows of one map.

    Args:
        weight: (out, …).
        bias: (out,) or None.
        deltas: Disjoint row ranges and the delta of each.

    Returns:
        New weight and bias; the arguments stay as they are.
    """
    weight = weight.clone(memory_format=torch.contiguous_format)  # channels_last has no matrix view
    bias = None if bias is None else bias.clone()
    if torch.compiler.is_exporting() and len(deltas) > 1:  # a graph copies what it writes into
        return _folded_pieces(weight, bias, deltas)
    for (start, stop), delta in deltas:
        delta.fold_(weight[start:stop], None if bias is None else bias[start:stop])
    return weight, bias


def _folded_pieces(
    weight: Tensor, bias: Tensor | None, deltas: Sequence[tuple[Rows, Delta]]
) -> tuple[Tensor, Tensor | None]:
    """The folded map put together from its row ranges."""
    weights, biases, done = list[Tensor](), list[Tensor](), 0
    for (start, stop), delta in [*deltas, ((len(weight), len(weight)), None)]:
        for first, last, change in ((done, start, None), (start, stop, delta)):
            if first < last:
                piece = weight[first:last].clone()
                shifted = None if bias is None else bias[first:last].clone()
                if change is not None:
                    change.fold_(piece, shifted)
                weights.append(piece)
                biases += [] if shifted is None else [shifted]
        done = stop
    return torch.cat(weights), torch.cat(biases) if biases else None


def apply_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    deltas: Sequence[tuple[Rows, WeightDelta]],
) -> Tensor:
    """Training's forward of a frozen linear map with deltas in it.

    Folds the deltas into W first, which is cheap because W is small beside the activations of a
    batch: the forward then costs what the plain map costs, whatever the update. The backward
    recomputes the fold instead of keeping it and forms gradients from the delta's structure
    (``WeightDelta.gradients``), so no dense weight gradient arises unless the update needs one.

    Args:
        x: (..., in).
        weight: Frozen W, (out, in).
        bias: Frozen b, (out,) or None.
        deltas: Row ranges and their deltas.

    Returns:
        (..., out) in autocast's dtype where autocast is on, else in x's.
    """
    layout = [(rows, delta.names()) for rows, delta in deltas]
    tensors = [getattr(delta, n) for _, delta in deltas for n in delta.names()]
    result: Tensor = _FoldedLinear.apply(x, weight, bias, layout, *tensors)
    return result


def _rebuild(
    layout: Sequence[tuple[Rows, tuple[str, ...]]], tensors: Sequence[Tensor]
) -> list[tuple[Rows, WeightDelta]]:
    remaining = iter(tensors)
    return [(rows, WeightDelta(**{n: next(remaining) for n in names})) for rows, names in layout]


class _FoldedLinear(torch.autograd.Function):
    """x ↦ x fold(W)ᵀ + fold(b) with structured gradients for the deltas."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layout: Any, *tensors: Tensor
    ) -> Tensor:
        kind = x.device.type
        compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            inputs = x.to(compute)
            folded, bias = fold_rows(weight, bias, _rebuild(layout, tensors))
            out = F.linear(inputs, folded.to(compute), None if bias is None else bias.to(compute))
        ctx.save_for_backward(inputs, weight, *tensors)
        ctx.layout, ctx.dtype = layout, x.dtype
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        inputs, weight, *tensors = ctx.saved_tensors
        deltas = _rebuild(ctx.layout, tensors)
        with torch.autocast(grad.device.type, enabled=False):
            grad_x = None
            if ctx.needs_input_grad[0]:
                folded, _ = fold_rows(weight, None, deltas)
                grad_x = (grad @ folded.to(grad.dtype)).to(ctx.dtype)
            parts = _gradients(inputs.flatten(0, -2), grad.flatten(0, -2), weight, deltas)
            flat = [
                parts[i][name].to(getattr(deltas[i][1], name).dtype)
                for i, (_, names) in enumerate(ctx.layout)
                for name in names
            ]
        return (grad_x, None, None, None, *flat)


def _gradients(
    x: Tensor, grad: Tensor, weight: Tensor, deltas: Sequence[tuple[Rows, WeightDelta]]
) -> list[dict[str, Tensor]]:
    """Gradients of the deltas' fields, given those of the output.

    The structure is used: only gains need a dense out × in product, and the low-rank parts of all
    rows share four thin products.

    Args:
        x: Inputs, (tokens, in).
        grad: Gradients of the outputs, (tokens, out).
        weight: W, (out, in).
        deltas: Row ranges and deltas.

    Returns:
        For each delta its fields' gradients by name, in float32 or wider.
    """
    wide = torch.promote_types(grad.dtype, torch.float32)
    parts = _low_rank_gradients(x, grad, deltas, wide)
    for ((start, stop), delta), part in zip(deltas, parts, strict=True):
        rows = grad[:, start:stop]
        if delta.diagonal is not None:
            d = delta.diagonal.shape[-1]
            part["diagonal"] = (rows[:, :d].to(wide) * x[:, :d].to(wide)).sum(0)
        if delta.gain_out is not None and delta.gain_in is not None:
            dense = (rows.mT @ x).to(wide) * weight[start:stop]
            part["gain_out"] = delta.gain_in.to(wide) @ dense.mT
            part["gain_in"] = delta.gain_out.to(wide) @ dense
        if delta.shift is not None:
            part["shift"] = rows.sum(0, dtype=wide)
    return parts


def _low_rank_gradients(
    x: Tensor, grad: Tensor, deltas: Sequence[tuple[Rows, WeightDelta]], wide: torch.dtype
) -> list[dict[str, Tensor]]:
    """Gradients of every ``left`` and ``right``, formed together."""
    pairs = [
        (F.pad(delta.left, (start, grad.shape[-1] - stop)), delta.right)
        for (start, stop), delta in deltas
        if delta.left is not None and delta.right is not None
    ]
    if not pairs:
        return [{} for _ in deltas]
    left = torch.cat([left for left, _ in pairs]).to(grad.dtype)
    right = torch.cat([right for _, right in pairs]).to(x.dtype)
    grad_left = ((x @ right.mT).mT @ grad).to(wide)
    grad_right = ((grad @ left.mT).mT @ x).to(wide)
    parts: list[dict[str, Tensor]] = []
    done = 0
    for (start, stop), delta in deltas:
        rank = 0 if delta.left is None else len(delta.left)
        chunk = slice(done, done + rank)
        parts.append(
            {"left": grad_left[chunk, start:stop], "right": grad_right[chunk]} if rank else {}
        )
        done += rank
    return parts
