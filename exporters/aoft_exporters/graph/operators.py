"""Operators and types of a graph in low precision, shared by its writer and its emulation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

PRODUCTS = frozenset("Conv ConvTranspose Gemm MatMul".split())
"""Computed in low precision."""


MOVES = frozenset(
    "Concat DepthToSpace Expand Flatten Gather GatherElements GatherND Identity Pad Reshape "
    "Slice SpaceToDepth Split Squeeze Tile Transpose Unsqueeze Where".split()
)
"""Operators that copy values and so round none."""


ELEMENTWISE = frozenset("Add Clip Div Gelu LeakyRelu Mul Neg Relu Sigmoid Sub Tanh".split())
"""Elementwise operators: computed in the precision of their inputs, in float32 if any is."""


NORMS = frozenset(
    "BatchNormalization GlobalAveragePool GroupNormalization InstanceNormalization "
    "LayerNormalization RMSNormalization Softmax".split()
)
"""What a classifier's features come from."""


NO_FLOATS = frozenset(
    "And ArgMax ArgMin Equal Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual NonZero Not Or "
    "Shape Size Xor".split()
)
"""Their results are integers or truth values."""


def low_kinds() -> tuple[int, int]:
    """ONNX's numbers of fp16 and bf16."""
    import onnx

    return onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16


def result_kind(node: Any, kinds: Mapping[str, int]) -> int | None:
    """The low type of a node's results; None where they are of another type."""
    if node.op_type == "Cast":
        (kind,) = (attribute.i for attribute in node.attribute if attribute.name == "to")
        return kind if kind in low_kinds() else None
    if node.op_type in NO_FLOATS:
        return None
    return next((kinds[name] for name in node.input if name in kinds), None)


def cast_node(name: str, result: str, kind: int) -> Any:
    """A node that converts a tensor to a type."""
    from onnx import helper

    return helper.make_node("Cast", [name], [result], f"{name}/{result}", to=kind)


def rank(value: Any) -> int:
    """Number of a tensor's axes."""
    return len(value.type.tensor_type.shape.dim)


def depending_nodes(nodes: Iterable[Any], names: Iterable[str]) -> set[int]:
    """Places of the nodes whose results depend on these tensors."""
    found, known = set(), set(names)
    for i, node in enumerate(nodes):
        if known.intersection(node.input):
            found.add(i)
            known.update(node.output)
    return found


def classifier_nodes(graph: Any) -> set[int]:
    """Places of the nodes between the features and the logits."""
    makers: Mapping[str, int] = {n: i for i, node in enumerate(graph.node) for n in node.output}
    found, open_ = set[int](), [value.name for value in graph.output]
    while open_:
        i = makers.get(open_.pop())
        if i is None or i in found or graph.node[i].op_type in NORMS:
            continue
        found.add(i)
        if graph.node[i].op_type not in PRODUCTS:
            open_ += graph.node[i].input
    return found
