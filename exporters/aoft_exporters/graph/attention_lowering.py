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
from aoft_exporters.graph.linked_graph import LinkedGraph, new_node
from aoft_exporters.graph.qkv_separation import separate_qkv

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
        separate: Compute q, k and v by maps of their own; see ``separate_qkv``.
    """
    graph = LinkedGraph(proto)
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
            separate_qkv(graph, attention.packed, attention.split)
        (_as_operator if one_operator else _as_products)(graph, attention)
    graph.write()
    if one_operator:
        (standard,) = (entry for entry in proto.opset_import if not entry.domain)
        standard.version = opset
        proto.ir_version = max(proto.ir_version, 11)


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

    @property
    def split(self) -> str:
        """Prefix of q, k and v, [batch, tokens, heads · width]."""
        return f"{self.name}/split"

    @classmethod
    def of(cls, graph: LinkedGraph, node: Any, name: str) -> _Attention:
        import onnx

        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        heads, width = attributes["heads"], attributes["width"]
        qkv, mask = list(node.input[:3]), list(node.input[3:])
        packed = _packed(graph, qkv, heads, width) if heads else ""
        last = _joined(graph, node, heads * width) if packed else None
        if last is None:
            packed, last = "", node
        return cls(name, qkv, mask, heads, width, attributes["scale"], packed, last)


def _packed(graph: LinkedGraph, qkv: list[str], heads: int, width: int) -> str:
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


def _joined(graph: LinkedGraph, node: Any, columns: int) -> Any:
    """The node that joins the heads, [batch, tokens, columns]; None if there is none."""
    transpose = graph.only_consumer(node.output[0], "Transpose")
    if transpose is None or list(transpose.attribute[0].ints) != [0, 2, 1, 3]:
        return None
    reshape = graph.only_consumer(transpose.output[0], "Reshape")
    shape = (graph.integers(reshape.input[1]) if reshape else None) or []
    return reshape if shape[2:] == [columns] else None


def _thirds(graph: LinkedGraph, attention: _Attention) -> tuple[list[str], list[Any]]:
    """Names of q, k and v, [batch, tokens, heads · width], and the node that splits them off."""
    names = [f"{attention.split}/{letter}" for letter in "qkv"]
    new_nodes = (node for nodes in graph.replacements.values() for node in nodes)
    if any(names[0] in node.output for node in new_nodes):
        return names, []
    return names, [new_node("Split", [attention.packed], *names, axis=-1, num_outputs=3)]


def _as_operator(graph: LinkedGraph, attention: _Attention) -> None:
    """Replace with ONNX's Attention: on three axes if qkv is packed, else on four."""
    output = attention.last.output[0]
    scale = {"scale": attention.scale}
    if not attention.packed:
        inputs = attention.inputs + attention.mask
        node = new_node("Attention", inputs, output, name=attention.name, **scale)
        graph.replacements[output] = [node]
        return
    names, nodes = _thirds(graph, attention)
    heads = {"q_num_heads": attention.heads, "kv_num_heads": attention.heads}
    graph.replacements[output] = [
        *nodes,
        new_node(
            "Attention", names + attention.mask, output, name=attention.name, **heads, **scale
        ),
    ]


def _as_products(graph: LinkedGraph, attention: _Attention) -> None:
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
            nodes.append(new_node("Reshape", [third, heads], f"{target}_tokens"))
            perm = [0, 2, *last]
            nodes.append(new_node("Transpose", [f"{target}_tokens"], target, perm=perm))
    else:
        nodes.append(new_node("Transpose", [inputs[1]], keys, perm=[0, 1, 3, 2]))
    factor = graph.constant(f"scale_{attention.scale!r}", np.float32(attention.scale))
    scores = f"{name}/scores"
    nodes += [
        new_node("Mul", [inputs[0], factor], f"{name}/scaled"),
        new_node("MatMul", [f"{name}/scaled", keys], scores),
    ]
    if attention.mask:
        nodes.append(new_node("Add", [scores, *attention.mask], f"{name}/masked"))
        scores = f"{name}/masked"
    nodes.append(new_node("Softmax", [scores], f"{name}/shares", axis=-1))
    result = f"{name}/heads" if attention.packed else output
    nodes.append(new_node("MatMul", [f"{name}/shares", inputs[2]], result))
    if attention.packed:
        joined = graph.constant(f"joined_{attention.heads * attention.width}", [0, 0, -1])
        nodes.append(new_node("Transpose", [result], f"{name}/tokens", perm=[0, 2, 1, 3]))
        nodes.append(new_node("Reshape", [f"{name}/tokens", joined], output))
    graph.replacements[output] = nodes
