"""Compute alike blocks of a graph with the nodes of the one that was traced."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from aoft_exporters.graph.attention_tracing import DOMAIN
from aoft_exporters.graph.repeated_blocks import BLOCK, INPUT, weight_prefix

__all__ = ["expanded"]


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
    nodes: list[Any] = []
    values: list[Any] = []
    tensors: dict[str, Any] = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == BLOCK and node.domain == DOMAIN:
            part = parts[_attribute(node, "first")]
            names = part.names(node, _attribute(node, "path"))
            nodes += [_renamed(each, names) for each in part.nodes]
            values += [_renamed(each, names) for each in part.values]
            for tensor in part.tensors:
                copied = part.tensor(tensor, _attribute(node, "path"), names)
                tensors[copied.name] = copied
        elif id(node) not in inside and (node.op_type, node.domain) != (INPUT, DOMAIN):
            nodes.append(node)
    own = {id(value) for part in parts.values() for value in part.values}
    values += [value for value in graph.value_info if id(value) not in own]
    nodes = _sorted(nodes)
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
        kind: Path of the block, and name of its output.
        inputs: Names of the block's inputs by their index.
        nodes: Nodes that depend on the block's inputs or weights.
        results: Names of their results.
        values: Shapes of their results.
        tensors: Initialisers that hold weights of the block.
    """

    def __init__(self, graph: Any, kind: str) -> None:
        self.kind = kind
        self.inputs: dict[int, str] = {}
        for node in graph.node:
            own_input = (node.op_type, node.domain) == (INPUT, DOMAIN)
            if own_input and _attribute(node, "first") == kind:
                self.inputs[_attribute(node, "index")] = node.output[0]
        self.tensors = [tensor for tensor in graph.initializer if self._own(tensor)]
        known = {*self.inputs.values(), *(tensor.name for tensor in self.tensors)}
        self.nodes: list[Any] = []
        for node in graph.node:
            if known.intersection(node.input):
                self.nodes.append(node)
                known.update(node.output)
        self.results = {name for node in self.nodes for name in node.output}
        self.values = [value for value in graph.value_info if value.name in self.results]

    def _own(self, tensor: Any) -> bool:
        """Whether an initialiser is a weight of the block."""
        form = json.loads(tensor.doc_string or '[""]')
        return str(form[0]).startswith(weight_prefix(self.kind))

    def names(self, node: Any, path: str) -> dict[str, str]:
        """New names of the part's values and weights for the block that a node stands for."""
        old, new = weight_prefix(self.kind), weight_prefix(path)
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
            [weight_prefix(path) + name.removeprefix(weight_prefix(self.kind)), *form]
        )
        return copied


def _attribute(node: Any, name: str) -> Any:
    """Value of a node's attribute; texts are decoded."""
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


def _sorted(nodes: list[Any]) -> list[Any]:
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
    """Replace the content of a repeated field by messages, some of which are from it."""
    kept = [type(item).FromString(item.SerializeToString()) for item in items]
    del field[:]
    field.extend(kept)
