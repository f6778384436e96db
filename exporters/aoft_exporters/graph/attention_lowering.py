"""Replace attention nodes with standard ONNX operators.

Tracing writes every scaled dot-product attention as one node ``aoft::Attention`` of q, k and v,
[batch, heads, tokens, width], and an optional mask. ``lower`` replaces it with ONNX's operator
Attention from opset 23 on, and with MatMul, Softmax and MatMul before. If q, k and v come from
timm's packed qkv, the replacement takes them from its columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from aoft_exporters.graph.attention_tracing import DOMAIN

__all__ = ["ATTENTION_OPSET", "lower"]

ATTENTION_OPSET = 23
"""First opset with an operator Attention."""

PACKED = [2, 0, 3, 1, 4]
"""timm's permutation of qkv, [batch, tokens, 3, heads, width]."""


def lower(proto: Any, opset: int, *, separate: bool = False) -> None:
    """Replace every ``aoft::Attention`` of a graph with standard operators, in place.

    Args:
        proto: An ONNX model of an opset below 23.
        opset: Target opset. The model's own opset is raised only if the graph has attention and
            the target is 23 or higher.
        separate: Split the weight of a packed qkv into three, for a runtime that reads the heads
            in place from the output of each product.
    """
    graph = _Graph(proto)
    attentions = [node for node in proto.graph.node if node.domain == DOMAIN]
    standard_opsets = [entry for entry in proto.opset_import if entry.domain != DOMAIN]
    del proto.opset_import[:]
    proto.opset_import.extend(standard_opsets)
    if not attentions:
        return
    one_operator = opset >= ATTENTION_OPSET
    for i, node in enumerate(attentions):
        attention = _Attention.of(graph, node, f"attention_{i}")
        if attention.packed and separate:
            _separate(graph, attention)
        (_as_operator if one_operator else _as_products)(graph, attention)
    graph.write()
    if one_operator:
        (standard,) = (entry for entry in proto.opset_import if not entry.domain)
        standard.version = opset
        proto.ir_version = max(proto.ir_version, 11)


class _Graph:
    """A graph's nodes by the values they produce and consume, and the replacements of nodes."""

    def __init__(self, proto: Any) -> None:
        self.graph = proto.graph
        self.producers = {name: node for node in proto.graph.node for name in node.output}
        self.consumers: dict[str, list[Any]] = {}
        for node in proto.graph.node:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)
        self.constants = {tensor.name: tensor for tensor in proto.graph.initializer}
        self.replacements: dict[str, list[Any]] = {}
        self.outputs = {value.name for value in proto.graph.output}

    def producer(self, name: str, kind: str) -> Any:
        """The node that produces a value if it has the given operator type, else None."""
        node = self.producers.get(name)
        return node if node is not None and node.op_type == kind else None

    def only_consumer(self, name: str, kind: str) -> Any:
        """The only node that consumes a value if it has the given operator type, else None."""
        nodes = self.consumers.get(name, [])
        matches = len(nodes) == 1 and name not in self.outputs and nodes[0].op_type == kind
        return nodes[0] if matches else None

    def integers(self, name: str) -> list[int] | None:
        """Values of an int64 constant; None if there is no such constant."""
        import onnx

        tensor = self.constants.get(name)
        if tensor is None or tensor.data_type != onnx.TensorProto.INT64:
            return None
        return [int(v) for v in onnx.numpy_helper.to_array(tensor).ravel()]

    def constant(self, name: str, values: Any) -> str:
        """Add a constant unless one of this name exists, and return its name."""
        import onnx

        if name not in self.constants:
            self.constants[name] = onnx.numpy_helper.from_array(np.asarray(values), name)
            self.graph.initializer.append(self.constants[name])
        return name

    def write(self) -> None:
        """Insert the replacements and remove unused nodes, initialisers and shapes."""
        nodes = []
        for node in self.graph.node:
            unchanged = [node] if node.domain != DOMAIN else []
            nodes += self.replacements.get(node.output[0], unchanged)
        needed, kept = set(self.outputs), []
        for node in reversed(nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                kept.append(node)
        del self.graph.node[:]
        self.graph.node.extend(reversed(kept))
        tensors = self.graph.initializer
        for i in reversed(range(len(tensors))):
            if tensors[i].name not in needed:
                del tensors[i]
        computed = {name for node in kept for name in node.output}
        shapes = [value for value in self.graph.value_info if value.name in computed]
        del self.graph.value_info[:]
        self.graph.value_info.extend(shapes)


class _Attention(NamedTuple):
    """One attention of a graph.

    Attributes:
        name: Prefix of the values that replace it.
        inputs: Names of q, k and v.
        mask: Name of the mask; empty without one.
        heads: Number of heads; 0 if it is dynamic.
        width: Width of a head.
        scale: Factor of the scores.
        packed: Name of the packed qkv that q, k and v are taken from; empty without one.
        last: The node whose output is replaced: the one that joins the heads if qkv is packed.
    """

    name: str
    inputs: list[str]
    mask: list[str]
    heads: int
    width: int
    scale: float
    packed: str
    last: Any

    @classmethod
    def of(cls, graph: _Graph, node: Any, name: str) -> _Attention:
        import onnx

        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        heads, width = attributes["heads"], attributes["width"]
        qkv, mask = list(node.input[:3]), list(node.input[3:])
        packed = _packed(graph, qkv, heads, width) if heads else ""
        last = _joined(graph, node, heads * width) if packed else None
        if last is None:
            packed, last = "", node
        return cls(name, qkv, mask, heads, width, attributes["scale"], packed, last)


def _packed(graph: _Graph, qkv: list[str], heads: int, width: int) -> str:
    """Name of the packed qkv, [batch, tokens, 3 · heads · width]; empty if there is none."""
    sources = set()
    for i, name in enumerate(qkv):
        squeeze = graph.producer(name, "Squeeze")
        part: Any = graph.producer(squeeze.input[0], "Slice") if squeeze else None
        bounds = [graph.integers(name) for name in part.input[1:]] if part else []
        if bounds not in ([[i], [i + 1], [0]], [[i], [i + 1], [0], [1]]):
            return ""
        sources.add(part.input[0])
    permuted: Any = graph.producer(sources.pop(), "Transpose") if len(sources) == 1 else None
    if permuted is None or list(permuted.attribute[0].ints) != PACKED:
        return ""
    reshape = graph.producer(permuted.input[0], "Reshape")
    shape = (graph.integers(reshape.input[1]) if reshape else None) or []
    return str(reshape.input[0]) if shape[2:] == [3, heads, width] else ""


def _joined(graph: _Graph, node: Any, columns: int) -> Any:
    """The node that joins the heads, [batch, tokens, columns]; None if there is none."""
    transpose = graph.only_consumer(node.output[0], "Transpose")
    if transpose is None or list(transpose.attribute[0].ints) != [0, 2, 1, 3]:
        return None
    reshape = graph.only_consumer(transpose.output[0], "Reshape")
    shape = (graph.integers(reshape.input[1]) if reshape else None) or []
    return reshape if shape[2:] == [columns] else None


def _separate(graph: _Graph, attention: _Attention) -> None:
    """Compute q, k and v by three linear maps if one with a bias computes the packed qkv."""
    import onnx

    split = f"{attention.name}/split"
    add = graph.producer(attention.packed, "Add")
    products = [graph.producer(name, "MatMul") for name in add.input] if add else []
    product = next(filter(None, products), None)
    if product is None or product.input[1] not in graph.constants:
        return
    (bias,) = (name for name in add.input if name != product.output[0])
    if bias not in graph.constants or len(graph.consumers[product.output[0]]) != 1:
        return
    weight = onnx.numpy_helper.to_array(graph.constants[product.input[1]])
    shift = onnx.numpy_helper.to_array(graph.constants[bias])
    columns = attention.heads * attention.width
    nodes = []
    for i, letter in enumerate("qkv"):
        part = slice(i * columns, (i + 1) * columns)
        names = [f"{name}.{letter}" for name in (product.input[1], bias)]
        graph.constant(names[0], np.ascontiguousarray(weight[:, part]))
        graph.constant(names[1], np.ascontiguousarray(shift[part]))
        unbiased, result = f"{split}/{letter}_product", f"{split}/{letter}"
        nodes += [
            _node("MatMul", [product.input[0], names[0]], unbiased),
            _node("Add", [unbiased, names[1]], result),
        ]
    before = graph.replacements.get(add.output[0], [add])
    graph.replacements[add.output[0]] = [*before, *nodes]


def _thirds(graph: _Graph, attention: _Attention) -> tuple[list[str], list[Any]]:
    """Names of q, k and v, [batch, tokens, heads · width], and the node that splits them off."""
    split = f"{attention.name}/split"
    names = [f"{split}/{letter}" for letter in "qkv"]
    new_nodes = (node for nodes in graph.replacements.values() for node in nodes)
    if any(names[0] in node.output for node in new_nodes):
        return names, []
    return names, [_node("Split", [attention.packed], *names, axis=-1, num_outputs=3)]


def _as_operator(graph: _Graph, attention: _Attention) -> None:
    """Replace with ONNX's Attention: on three axes if qkv is packed, else on four."""
    output = attention.last.output[0]
    scale = {"scale": attention.scale}
    if not attention.packed:
        inputs = attention.inputs + attention.mask
        node = _node("Attention", inputs, output, name=attention.name, **scale)
        graph.replacements[output] = [node]
        return
    names, nodes = _thirds(graph, attention)
    heads = {"q_num_heads": attention.heads, "kv_num_heads": attention.heads}
    graph.replacements[output] = [
        *nodes,
        _node("Attention", names + attention.mask, output, name=attention.name, **heads, **scale),
    ]


def _as_products(graph: _Graph, attention: _Attention) -> None:
    """Replace with softmax(scale · q kᵀ + mask) v, written out as operators."""
    name, output = attention.name, attention.last.output[0]
    nodes: list[Any] = []
    inputs, keys = attention.inputs, f"{name}/keys"
    if attention.packed:
        thirds, nodes = _thirds(graph, attention)
        inputs = [f"{name}/queries", keys, f"{name}/values"]
        heads = graph.constant(
            f"heads_{attention.heads}x{attention.width}", [0, 0, attention.heads, attention.width]
        )
        for third, target, last in zip(thirds, inputs, ([1, 3], [3, 1], [1, 3]), strict=True):
            nodes.append(_node("Reshape", [third, heads], f"{target}_tokens"))
            perm = [0, 2, *last]
            nodes.append(_node("Transpose", [f"{target}_tokens"], target, perm=perm))
    else:
        nodes.append(_node("Transpose", [inputs[1]], keys, perm=[0, 1, 3, 2]))
    factor = graph.constant(f"scale_{attention.scale!r}", np.float32(attention.scale))
    scores = f"{name}/scores"
    nodes += [
        _node("Mul", [inputs[0], factor], f"{name}/scaled"),
        _node("MatMul", [f"{name}/scaled", keys], scores),
    ]
    if attention.mask:
        nodes.append(_node("Add", [scores, *attention.mask], f"{name}/masked"))
        scores = f"{name}/masked"
    nodes.append(_node("Softmax", [scores], f"{name}/shares", axis=-1))
    result = f"{name}/heads" if attention.packed else output
    nodes.append(_node("MatMul", [f"{name}/shares", inputs[2]], result))
    if attention.packed:
        joined = graph.constant(f"joined_{attention.heads * attention.width}", [0, 0, -1])
        nodes.append(_node("Transpose", [result], f"{name}/tokens", perm=[0, 2, 1, 3]))
        nodes.append(_node("Reshape", [f"{name}/tokens", joined], output))
    graph.replacements[output] = nodes


def _node(kind: str, inputs: list[str], *outputs: str, name: str = "", **attributes: Any) -> Any:
    import onnx

    return onnx.helper.make_node(kind, inputs, outputs, name=name or outputs[0], **attributes)
