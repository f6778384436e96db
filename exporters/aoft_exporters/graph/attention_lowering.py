"""Attention as one node of an ONNX graph, and what it becomes for a runtime.

While a model is traced, every scaled dot product attention becomes one node ``aoft::Attention`` of
q, k, v, [batch, heads, tokens, width], and perhaps a mask. ``lower`` turns these nodes into ONNX:
from opset 23 on into its operator Attention, which takes timm's packed qkv as three ranges of its
columns; before into a product, a softmax and a product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from aoft_exporters.graph.attention_tracing import DOMAIN

__all__ = ["ATTENTION_OPSET", "lower"]

ATTENTION_OPSET = 23
"""The first with an operator Attention."""

PACKED = [2, 0, 3, 1, 4]
"""How timm permutes qkv, [batch, tokens, 3, heads, width]."""


def lower(proto: Any, opset: int, *, separate: bool = False) -> None:
    """Turn every ``aoft::Attention`` of a graph into ONNX's own operators, in place.

    Args:
        proto: An ONNX model of an opset below 23.
        opset: The opset to state it in; one from 23 on is taken only if there is attention.
        separate: Split the weights of packed qkv into three, for a runtime that reads the heads
            where each product wrote them.
    """
    graph = _Graph(proto)
    attentions = [node for node in proto.graph.node if node.domain == DOMAIN]
    kept = [entry for entry in proto.opset_import if entry.domain != DOMAIN]
    del proto.opset_import[:]
    proto.opset_import.extend(kept)
    if not attentions:
        return
    one_operator = opset >= ATTENTION_OPSET
    for place, node in enumerate(attentions):
        attention = _Attention.of(graph, node, f"attention_{place}")
        if attention.packed and separate:
            _separate(graph, attention)
        (_as_operator if one_operator else _as_products)(graph, attention)
    graph.write()
    if one_operator:
        (standard,) = (entry for entry in proto.opset_import if not entry.domain)
        standard.version = opset
        proto.ir_version = max(proto.ir_version, 11)


class _Graph:
    """Nodes by what they make and take, and what stands in place of some of them."""

    def __init__(self, proto: Any) -> None:
        self.graph = proto.graph
        self.makers = {name: node for node in proto.graph.node for name in node.output}
        self.takers: dict[str, list[Any]] = {}
        for node in proto.graph.node:
            for name in node.input:
                self.takers.setdefault(name, []).append(node)
        self.constants = {tensor.name: tensor for tensor in proto.graph.initializer}
        self.instead: dict[str, list[Any]] = {}
        self.outputs = {value.name for value in proto.graph.output}

    def maker(self, name: str, kind: str) -> Any:
        """The node of a kind that makes a value; None if another does."""
        node = self.makers.get(name)
        return node if node is not None and node.op_type == kind else None

    def taker(self, name: str, kind: str) -> Any:
        """The node of a kind that alone takes a value; None otherwise."""
        nodes = self.takers.get(name, [])
        alone = len(nodes) == 1 and name not in self.outputs and nodes[0].op_type == kind
        return nodes[0] if alone else None

    def values(self, name: str) -> list[int] | None:
        """A constant of whole numbers."""
        import onnx

        tensor = self.constants.get(name)
        if tensor is None or tensor.data_type != onnx.TensorProto.INT64:
            return None
        return [int(v) for v in onnx.numpy_helper.to_array(tensor).ravel()]

    def constant(self, name: str, values: Any) -> str:
        """A new constant, or the one of that name."""
        import onnx

        if name not in self.constants:
            self.constants[name] = onnx.numpy_helper.from_array(np.asarray(values), name)
            self.graph.initializer.append(self.constants[name])
        return name

    def write(self) -> None:
        """Put the replacements in, and leave out what nothing needs any more."""
        nodes = [
            new
            for node in self.graph.node
            for new in self.instead.get(node.output[0], [node] if node.domain != DOMAIN else [])
        ]
        needed, kept = set(self.outputs), []
        for node in reversed(nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                kept.append(node)
        del self.graph.node[:]
        self.graph.node.extend(reversed(kept))
        tensors = self.graph.initializer
        for place in reversed(range(len(tensors))):
            if tensors[place].name not in needed:
                del tensors[place]
        made = {name for node in kept for name in node.output}
        shapes = [value for value in self.graph.value_info if value.name in made]
        del self.graph.value_info[:]
        self.graph.value_info.extend(shapes)


class _Attention(NamedTuple):
    """An attention, its inputs as three maps of one packed tensor if they are."""

    name: str
    inputs: list[str]
    mask: list[str]
    heads: int
    width: int
    scale: float
    packed: str
    end: Any

    @classmethod
    def of(cls, graph: _Graph, node: Any, name: str) -> _Attention:
        import onnx

        told = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        heads, width = told["heads"], told["width"]
        qkv, mask = list(node.input[:3]), list(node.input[3:])
        packed = _packed(graph, qkv, heads, width) if heads else ""
        end = _joined(graph, node, heads * width) if packed else None
        if end is None:
            packed, end = "", node
        return cls(name, qkv, mask, heads, width, told["scale"], packed, end)


def _packed(graph: _Graph, qkv: list[str], heads: int, width: int) -> str:
    """The value [batch, tokens, 3 · heads · width] that q, k and v are the thirds of, or ''."""
    sources = set()
    for place, name in enumerate(qkv):
        squeeze = graph.maker(name, "Squeeze")
        part: Any = graph.maker(squeeze.input[0], "Slice") if squeeze else None
        bounds = [graph.values(name) for name in part.input[1:]] if part else []
        if bounds not in ([[place], [place + 1], [0]], [[place], [place + 1], [0], [1]]):
            return ""
        sources.add(part.input[0])
    permuted: Any = graph.maker(sources.pop(), "Transpose") if len(sources) == 1 else None
    if permuted is None or list(permuted.attribute[0].ints) != PACKED:
        return ""
    reshape = graph.maker(permuted.input[0], "Reshape")
    shape = (graph.values(reshape.input[1]) if reshape else None) or []
    return str(reshape.input[0]) if shape[2:] == [3, heads, width] else ""


def _joined(graph: _Graph, node: Any, columns: int) -> Any:
    """The node that puts the heads side by side, [batch, tokens, columns]; None without it."""
    transpose = graph.taker(node.output[0], "Transpose")
    if transpose is None or list(transpose.attribute[0].ints) != [0, 2, 1, 3]:
        return None
    reshape = graph.taker(transpose.output[0], "Reshape")
    shape = (graph.values(reshape.input[1]) if reshape else None) or []
    return reshape if shape[2:] == [columns] else None


def _separate(graph: _Graph, attention: _Attention) -> None:
    """Let three linear maps make q, k and v, where one with a bias makes all."""
    import onnx

    split = f"{attention.name}/split"
    add = graph.maker(attention.packed, "Add")
    products = [graph.maker(name, "MatMul") for name in add.input] if add else []
    product = next(filter(None, products), None)
    if product is None or product.input[1] not in graph.constants:
        return
    (bias,) = (name for name in add.input if name != product.output[0])
    if bias not in graph.constants or len(graph.takers[product.output[0]]) != 1:
        return
    weight = onnx.numpy_helper.to_array(graph.constants[product.input[1]])
    shift = onnx.numpy_helper.to_array(graph.constants[bias])
    columns = attention.heads * attention.width
    nodes = []
    for place, letter in enumerate("qkv"):
        part = slice(place * columns, (place + 1) * columns)
        names = [f"{name}.{letter}" for name in (product.input[1], bias)]
        graph.constant(names[0], np.ascontiguousarray(weight[:, part]))
        graph.constant(names[1], np.ascontiguousarray(shift[part]))
        between, end = f"{split}/{letter}_product", f"{split}/{letter}"
        nodes += [
            _node("MatMul", [product.input[0], names[0]], between),
            _node("Add", [between, names[1]], end),
        ]
    graph.instead[add.output[0]] = [*graph.instead.get(add.output[0], [add]), *nodes]


def _thirds(graph: _Graph, attention: _Attention) -> tuple[list[str], list[Any]]:
    """Names of q, k and v, [batch, tokens, heads · width], and the node that makes them."""
    split = f"{attention.name}/split"
    names = [f"{split}/{letter}" for letter in "qkv"]
    made = {name for nodes in graph.instead.values() for node in nodes for name in node.output}
    if names[0] in made:
        return names, []
    return names, [_node("Split", [attention.packed], *names, axis=-1, num_outputs=3)]


def _as_operator(graph: _Graph, attention: _Attention) -> None:
    """ONNX's Attention: of three axes where qkv is packed, else of four."""
    end = attention.end.output[0]
    scale = {"scale": attention.scale}
    if not attention.packed:
        inputs = attention.inputs + attention.mask
        graph.instead[end] = [_node("Attention", inputs, end, name=attention.name, **scale)]
        return
    names, nodes = _thirds(graph, attention)
    heads = {"q_num_heads": attention.heads, "kv_num_heads": attention.heads}
    graph.instead[end] = [
        *nodes,
        _node("Attention", names + attention.mask, end, name=attention.name, **heads, **scale),
    ]


def _as_products(graph: _Graph, attention: _Attention) -> None:
    """softmax(scale · q kᵀ + mask) v."""
    name, end = attention.name, attention.end.output[0]
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
    result = f"{name}/heads" if attention.packed else end
    nodes.append(_node("MatMul", [f"{name}/shares", inputs[2]], result))
    if attention.packed:
        joined = graph.constant(f"joined_{attention.heads * attention.width}", [0, 0, -1])
        nodes.append(_node("Transpose", [result], f"{name}/tokens", perm=[0, 2, 1, 3]))
        nodes.append(_node("Reshape", [f"{name}/tokens", joined], end))
    graph.instead[end] = nodes


def _node(kind: str, inputs: list[str], *outputs: str, name: str = "", **told: Any) -> Any:
    import onnx

    return onnx.helper.make_node(kind, inputs, outputs, name=name or outputs[0], **told)
