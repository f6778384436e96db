"""Trace one of several blocks that are alike, and compute the others with the same nodes.

The model is traced with a node ``aoft::Block`` for each block. Beside it, one block of each kind is
traced, from nodes ``aoft::BlockInput``. ``block_expansion.expanded`` then replaces every
``aoft::Block`` with the nodes of its kind, which it gives the weights of that block.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aoft_deploy.errors import AoftError
from aoft_exporters.graph.attention_tracing import DOMAIN
from aoft_exporters.graph.tracing import plain_name

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["BLOCK", "INPUT", "NotAlikeError", "one_of_each_kind", "weight_prefix"]

BLOCK, INPUT = "Block", "BlockInput"
"""Operators of the nodes that stand for a block, and for an input of the traced one."""


class NotAlikeError(AoftError):
    """One block cannot stand for all, because they are called in different ways."""


@dataclass(frozen=True)
class Call:
    """How a block is called.

    Attributes:
        arguments: Positional and named arguments; of a tensor, its ``Place``.
        deltas: For a fleet's block, the name of each site below the block, the type of its delta,
            and the names of the fields, whose tensors follow those of the arguments.
        tensors: Axes and type of every tensor, as texts.
    """

    arguments: tuple[Any, ...]
    deltas: tuple[tuple[str, type, tuple[str, ...]], ...]
    tensors: tuple[tuple[str, str], ...]


class Place(int):
    """Place of a tensor among the tensors of a call."""


@contextlib.contextmanager
def one_of_each_kind(model: nn.Module, firsts: Mapping[str, str]) -> Iterator[tuple[str, ...]]:
    """Context manager: the model computes its output, and that of the first block of each kind.

    Args:
        model: The model that is traced meanwhile. The trace fails with ``NotAlikeError`` if one
            block cannot stand for all of its kind.
        firsts: Paths of all blocks, each with that of the first of its kind; see ``alike_modules``.

    Returns:
        Names of the outputs after the model's own.
    """
    kinds = tuple(dict.fromkeys(firsts.values()))
    calls = _Calls(model, firsts)
    own = model.forward

    @functools.wraps(own)
    def forward(*inputs: Tensor) -> tuple[Tensor, ...]:
        with calls.recorded():
            output = own(*inputs)
        return (output, *map(calls.output, kinds))

    vars(model)["forward"] = forward
    try:
        yield kinds
    finally:
        del vars(model)["forward"]


class _Calls:
    """The calls of a model's blocks, while it is traced."""

    def __init__(self, model: nn.Module, firsts: Mapping[str, str]) -> None:
        self.model, self.firsts = model, firsts
        self.batch: Any = getattr(model, "batch_deltas", None)  # of a fleet's model
        self.blocks = {path: model.get_submodule(path) for path in firsts}
        self.calls: dict[str, tuple[Call, list[Tensor]]] = {}  # by the first of each kind
        self.called: list[str] = []

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Context manager: a call of a block becomes one node."""
        self.calls, self.called = {}, []
        for path, block in self.blocks.items():
            vars(block)["forward"] = functools.partial(self._record, path)
        try:
            yield
        finally:
            for block in self.blocks.values():
                del vars(block)["forward"]
        if sorted(self.called) != sorted(self.blocks):
            raise NotAlikeError("A block is called more than once, or never.")

    def _record(self, path: str, *args: Any, **options: Any) -> Tensor:
        tensors: list[Tensor] = []
        arguments = _without_tensors((args, options), tensors)
        deltas = self._deltas(path, tensors)
        call = Call(arguments, deltas, tuple(map(_form, tensors)))
        first = self.firsts[path]
        if self.calls.setdefault(first, (call, tensors))[0] != call:
            raise NotAlikeError(f"{path} is called in another way than {first}.")
        self.called.append(path)
        return _node(BLOCK, tensors, tensors[0], path=path, first=first)

    def _deltas(self, path: str, tensors: list[Tensor]) -> tuple[Any, ...]:
        """The form of a block's deltas, whose tensors are added to ``tensors``."""
        found = self.batch.of(self.blocks[path]) if self.batch is not None else {}
        for delta in found.values():
            tensors += [getattr(delta, name) for name in delta.names()]
        prefix = weight_prefix(path)
        return tuple((s.removeprefix(prefix), type(d), d.names()) for s, d in found.items())

    def output(self, first: str) -> Tensor:
        """The output of a block from inputs that are nodes."""
        call, like = self.calls[first]
        tensors = [_node(INPUT, [], t, first=first, index=i) for i, t in enumerate(like)]
        remaining = iter(tensors)
        args, options = _with_tensors(call.arguments, remaining)
        deltas = {
            f"{weight_prefix(first)}{site}": kind(**{name: next(remaining) for name in names})
            for site, kind, names in call.deltas
        }
        given = contextlib.nullcontext() if self.batch is None else self.batch.given(deltas)
        with given:
            output: Tensor = self.blocks[first](*args, **options)
        if not _of_one_shape(output, tensors[0]):
            raise NotAlikeError(f"{first} changes the shape of its input.")
        return output


def weight_prefix(path: str) -> str:
    """Start of the names of a block's weights and sites, with the dot."""
    return plain_name(f"{path}.")


def _node(kind: str, inputs: list[Tensor], like: Tensor, **attributes: Any) -> Tensor:
    """A node of this project whose output has the shape and type of a tensor."""
    import torch

    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{kind}", inputs, attributes, dtype=like.dtype, shape=(*like.shape,), version=1
    )


def _form(tensor: Tensor) -> tuple[str, str]:
    """Axes and type. Comparing the lengths of dynamic axes would fix them; their texts do not."""
    return str(tuple(map(str, tensor.shape))), str(tensor.dtype)


def _of_one_shape(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are known to have the same type and shape."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    if a.dtype != b.dtype or a.dim() != b.dim():
        return False
    return all(statically_known_true(m == n) for m, n in zip(a.shape, b.shape, strict=True))


def _without_tensors(value: Any, tensors: list[Tensor]) -> Any:
    """Arguments with a place for each tensor, which is added to ``tensors``.

    Raises:
        NotAlikeError: An argument is of another type than tensors and plain values.
    """
    import torch

    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return Place(len(tensors) - 1)
    if isinstance(value, (tuple, list)):
        return type(value)([_without_tensors(each, tensors) for each in value])
    if isinstance(value, dict):
        return {name: _without_tensors(each, tensors) for name, each in value.items()}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise NotAlikeError(f"An argument is of the type {type(value).__name__}.")


def _with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Arguments with the next tensors in their places."""
    if isinstance(value, Place):
        return next(tensors)
    if isinstance(value, (tuple, list)):
        return type(value)([_with_tensors(each, tensors) for each in value])
    if isinstance(value, dict):
        return {name: _with_tensors(each, tensors) for name, each in value.items()}
    return value
