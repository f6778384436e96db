"""Emulate a low-precision graph in float32 by rounding every result."""

from __future__ import annotations

from typing import Any

from aoft_exporters.graph.operators import (
    MOVES,
    PRODUCTS,
    cast_node,
    classifier_nodes,
    depending_nodes,
    low_kinds,
    rank,
    result_kind,
)

__all__ = ["emulated", "left_in_float", "low_results"]


def emulated(proto: Any, *, rounded: bool = True) -> Any:
    """A float32 graph that computes the results of a low-precision graph.

    It serves runtimes that have no kernels in low precision or do not round between operators. Sums
    within a product are in float32, as on GPUs. Weights remain stored in low precision.

    Args:
        proto: A graph of ``typed``; it is not changed.
        rounded: Round every result to its precision. Without rounding, results beyond the range
            keep their magnitude.

    Returns:
        A new ONNX model with the same inputs, outputs, initialisers and metadata.
    """
    import onnx

    result = onnx.ModelProto()
    result.CopyFrom(proto)
    float32 = onnx.TensorProto.FLOAT
    nodes, kinds = list[Any](), dict[str, int]()
    for tensor in result.graph.initializer:
        if tensor.data_type in low_kinds():
            kinds[tensor.name] = tensor.data_type
            nodes.append(cast_node(tensor.name, f"{tensor.name}.stored", float32))
    stored = {name: f"{name}.stored" for name in kinds}
    for node in proto.graph.node:
        kind = result_kind(node, kinds)
        step = onnx.NodeProto()
        step.CopyFrom(node)
        for i, name in enumerate(step.input):
            step.input[i] = stored.get(name, name)
        nodes.append(step)
        if kind is None:
            continue
        kinds.update(dict.fromkeys(node.output, kind))
        if node.op_type == "Cast":
            step.CopyFrom(cast_node(step.input[0], node.output[0], float32))
        if rounded and node.op_type not in MOVES:
            for i, name in enumerate(node.output):
                step.output[i] = f"{name}.exact"
                nodes.append(cast_node(step.output[i], f"{name}.low", kind))
                nodes.append(cast_node(f"{name}.low", name, float32))
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    return result


def low_results(proto: Any) -> dict[str, str]:
    """Computed tensors in low precision.

    Returns:
        Their names, each with the tensor's name in the float32 graph before ``typed``.
    """
    kinds = {t.name: t.data_type for t in proto.graph.initializer if t.data_type in low_kinds()}
    results = {}
    for node in proto.graph.node:
        kind = result_kind(node, kinds)
        if kind is not None:
            kinds.update(dict.fromkeys(node.output, kind))
            for name in node.output:
                results[name] = node.input[0] if node.op_type == "Cast" else name
    return results


def left_in_float(proto: Any) -> list[str]:
    """Products that remain in float32 in a low-precision graph, without the classifier.

    Returns:
        Names of their weights, or of the nodes if both factors are computed.
    """
    graph, low = proto.graph, low_results(proto)
    weights = {tensor.name for tensor in graph.initializer}
    images = depending_nodes(graph.node, [v.name for v in graph.input if rank(v) == 4])
    classifier = classifier_nodes(graph)
    return [
        next((name for name in node.input if name in weights), node.name)
        for i, node in enumerate(graph.node)
        if node.op_type in PRODUCTS
        and i in images
        and i not in classifier
        and node.output[0] not in low
    ]
