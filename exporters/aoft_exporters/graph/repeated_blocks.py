"""Trace one of several blocks that are alike, and compute the others with the same nodes.

The model is traced with a node ``aoft::Block`` for each block. Beside it, one block of each kind is
traced, from nodes ``aoft::BlockInput``. ``expanded`` then replaces every ``aoft::Block`` with the
nodes of its kind, which it gives the weights of that block.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aoft_exporters.graph.attention_tracing import DOMAIN
from aoft_exporters.graph.tracing import plain_name

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["NotAlikeError", "expanded", "one_of_each_kind"]

BLOCK, INPUT = "Block", "BlockInput"
"""Operators of the nodes that stand for a block, and for an input of the traced one."""


class NotAlikeError(Exception):
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
        self.batch: Any = getattr(model, "batch", None)  # the deltas, if it is a fleet's model
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
        prefix = _prefix(path)
        return tuple((s.removeprefix(prefix), type(d), d.names()) for s, d in found.items())

    def output(self, first: str) -> Tensor:
        """The output of a block from inputs that are nodes."""
        call, like = self.calls[first]
        tensors = [_node(INPUT, [], t, first=first, index=i) for i, t in enumerate(like)]
        remaining = iter(tensors)
        args, options = _with_tensors(call.arguments, remaining)
        deltas = {
            f"{_prefix(first)}{site}": kind(**{name: next(remaining) for name in names})
            for site, kind, names in call.deltas
        }
        given = contextlib.nullcontext() if self.batch is None else self.batch.given(deltas)
        with given:
            output: Tensor = self.blocks[first](*args, **options)
        if not _of_one_shape(output, tensors[0]):
            raise NotAlikeError(f"{first} changes the shape of its input.")
        return output


def _prefix(path: str) -> str:
    """Start of the names of a block's weights and sites."""
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
    if isinstance(value, tuple):
        return tuple(_without_tensors(each, tensors) for each in value)
    if isinstance(value, dict):
        return {name: _without_tensors(each, tensors) for name, each in value.items()}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise NotAlikeError(f"An argument is of the type {type(value).__name__}.")


def _with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Arguments with the next tensors in their places."""
    if isinstance(value, Place):
        return next(tensors)
    if isinstance(value, tuple):
        return tuple(_with_tensors(each, tensors) for each in value)
    if isinstance(value, dict):
        return {name: _with_tensors(each, tensors) for name, each in value.items()}
    return value


def expanded(proto: Any, kinds: tuple[str, ...]) -> None:
    """Replace every ``aoft::Block`` of a graph with the nodes of its kind, in place.

    Args:
        proto: The traced ONNX model. The ``doc_string`` of each weight's initialiser is a JSON list
            that begins with the weight's name.
        kinds: Names of the outputs after the model's own.
    """
    graph = proto.graph
    parts = {kind: _Part(graph, kind) for kind in kinds}
    inside = {id(node) for part in parts.values() for node in part.nodes}
    nodes, values, tensors = [], [], {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == BLOCK and node.domain == DOMAIN:
            part = parts[_attribute(node, "first")]
            names = part.names(node, _attribute(node, "path"))
            nodes += [_renamed(each, names) for each in part.nodes]
            values += [_renamed(each, names) for each in part.values]
            for tensor in part.tensors:
                copied = part.tensor(tensor, _attribute(node, "path"), names)
                tensors[copied.name] = copied
        elif id(node) not in inside and node.op_type != INPUT:
            nodes.append(node)
    own = {id(value) for part in parts.values() for value in part.values}
    values += [value for value in graph.value_info if id(value) not in own]
    nodes = _sorted(nodes, {*tensors, *(value.name for value in graph.input)})
    used = {name for node in nodes for name in node.input}
    outputs = [value for value in graph.output if value.name not in kinds]
    known = used.union(name for node in nodes for name in node.output)
    _replace(graph.node, nodes)
    _replace(graph.value_info, [value for value in values if value.name in known])
    _replace(graph.initializer, [tensor for name, tensor in tensors.items() if name in used])
    _replace(graph.output, outputs)


class _Part:
    """The part of a graph that computes the first block of a kind.

    Attributes:
        nodes: Nodes that depend on the block's inputs or weights.
        values: Shapes of their results.
        tensors: Initialisers that hold weights of the block.
    """

    def __init__(self, graph: Any, kind: str) -> None:
        self.kind, self.inputs = kind, dict[int, str]()
        for node in graph.node:
            if node.op_type == INPUT and _attribute(node, "first") == kind:
                self.inputs[_attribute(node, "index")] = node.output[0]
        self.tensors = [tensor for tensor in graph.initializer if self._own(tensor)]
        known = {*self.inputs.values(), *(tensor.name for tensor in self.tensors)}
        self.nodes = []
        for node in graph.node:
            if known.intersection(node.input):
                self.nodes.append(node)
                known.update(node.output)
        self.results = {name for node in self.nodes for name in node.output}
        self.values = [value for value in graph.value_info if value.name in self.results]

    def _own(self, tensor: Any) -> bool:
        form = json.loads(tensor.doc_string or '[""]')
        return str(form[0]).startswith(_prefix(self.kind))

    def names(self, node: Any, path: str) -> dict[str, str]:
        """New names of the part's values and weights for the block that a node stands for."""
        old, new = _prefix(self.kind), _prefix(path)
        names = {name: f"{new[:-1]}/{name}" for name in self.results}
        names |= {name: node.input[i] for i, name in self.inputs.items()}
        names[self.kind] = node.output[0]
        for tensor in self.tensors:
            name = tensor.name
            is_weight = name.startswith(old)
            names[name] = new + name.removeprefix(old) if is_weight else f"{new[:-1]}/{name}"
        return names

    def tensor(self, tensor: Any, path: str, names: Mapping[str, str]) -> Any:
        """The initialiser of the same weight of the block at ``path``."""
        copied = type(tensor)()
        copied.CopyFrom(tensor)
        name, *form = json.loads(tensor.doc_string)
        copied.name = names[tensor.name]
        copied.doc_string = json.dumps(
            [_prefix(path) + name.removeprefix(_prefix(self.kind)), *form]
        )
        return copied


def _attribute(node: Any, name: str) -> Any:
    import onnx

    (found,) = (a for a in node.attribute if a.name == name)
    value = onnx.helper.get_attribute_value(found)
    return value.decode() if isinstance(value, bytes) else value


def _renamed(message: Any, names: Mapping[str, str]) -> Any:
    """A copy of a node or value with other names of values."""
    copied = type(message)()
    copied.CopyFrom(message)
    if not hasattr(copied, "op_type"):
        copied.name = names[copied.name]
        return copied
    for field in (copied.input, copied.output):
        renamed = [names.get(name, name) for name in field]
        del field[:]
        field.extend(renamed)
    copied.name = copied.output[0]
    return copied


def _sorted(nodes: list[Any], known: set[str]) -> list[Any]:
    """Nodes in an order in which each follows those whose results it uses."""
    producers = {name: node for node in nodes for name in node.output}
    ordered: list[Any] = []
    done: set[int] = set()

    def place(node: Any) -> None:
        done.add(id(node))
        for name in node.input:
            before = producers.get(name)
            if before is not None and id(before) not in done:
                place(before)
        ordered.append(node)

    for node in nodes:
        if id(node) not in done:
            place(node)
    return ordered


def _replace(field: Any, items: list[Any]) -> None:
    kept = [type(item).FromString(item.SerializeToString()) for item in items]
    del field[:]
    field.extend(kept)
