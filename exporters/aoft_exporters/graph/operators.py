"""Operators and types of low-precision graphs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = [
    "ELEMENTWISE",
    "MOVES",
    "NORMS",
    "NO_FLOATS",
    "PRODUCTS",
    "cast_node",
    "classifier_nodes",
    "depending_nodes",
    "low_kinds",
    "rank",
    "result_kind",
    "stored_kinds",
]

PRODUCTS = frozenset("Attention Conv ConvTranspose Gemm MatMul".split())
"""Matrix products, attention and convolutions, computed in low precision."""

MOVES = frozenset(
    "Concat DepthToSpace Expand Flatten Gather GatherElements GatherND Identity Pad Reshape "
    "Slice SpaceToDepth Split Squeeze Tile Transpose Unsqueeze Where".split()
)
"""Operators that copy values without rounding."""

ELEMENTWISE = frozenset("Add Clip Div Gelu LeakyRelu Mul Neg Relu Sigmoid Sub Tanh".split())
"""Elementwise operators, in low precision only if all computed inputs are."""

NORMS = frozenset(
    "BatchNormalization GlobalAveragePool GroupNormalization InstanceNormalization "
    "LayerNormalization RMSNormalization Softmax".split()
)
"""Norms, poolings and softmax, whose last output is the features of the classifier."""

NO_FLOATS = frozenset(
    "And ArgMax ArgMin Equal Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual NonZero Not Or "
    "QuantizeLinear Shape Size Xor".split()
)
"""Operators with integer, boolean or quantised results."""


def low_kinds() -> tuple[int, int]:
    """ONNX's type codes of fp16 and bf16."""
    import onnx

    return onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16


def stored_kinds(proto: Any) -> dict[str, int]:
    """Types of the initialisers in low precision, by name."""
    return {t.name: t.data_type for t in proto.graph.initializer if t.data_type in low_kinds()}


def result_kind(node: Any, kinds: Mapping[str, int]) -> int | None:
    """The low-precision type of a node's results; None if they have another type."""
    if node.op_type == "Cast":
        (kind,) = (attribute.i for attribute in node.attribute if attribute.name == "to")
        return kind if kind in low_kinds() else None
    if node.op_type in NO_FLOATS:
        return None
    return next((kinds[name] for name in node.input if name in kinds), None)


def cast_node(name: str, result: str, kind: int) -> Any:
    """A node that casts a tensor to a type."""
    from onnx import helper

    return helper.make_node("Cast", [name], [result], f"{name}/{result}", to=kind)


def rank(value: Any) -> int:
    """Number of a tensor's axes."""
    return len(value.type.tensor_type.shape.dim)


def depending_nodes(nodes: Iterable[Any], names: Iterable[str]) -> set[int]:
    """Indices of the nodes whose results depend on these tensors."""
    found, known = set(), set(names)
    for i, node in enumerate(nodes):
        if known.intersection(node.input):
            found.add(i)
            known.update(node.output)
    return found


def classifier_nodes(graph: Any) -> set[int]:
    """Indices of the nodes between the features and the logits."""
    producers: Mapping[str, int] = {n: i for i, node in enumerate(graph.node) for n in node.output}
    found, pending = set[int](), [value.name for value in graph.output]
    while pending:
        i = producers.get(pending.pop())
        if i is None or i in found or graph.node[i].op_type in NORMS:
            continue
        found.add(i)
        if graph.node[i].op_type not in PRODUCTS:
            pending += graph.node[i].input
    return found
