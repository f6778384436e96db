"""Emulate a low-precision graph in float32: every result is rounded, in TF32 every factor."""

from __future__ import annotations

from typing import Any

from aoft_exporters.graph.attention_steps import spelled_out
from aoft_exporters.graph.operators import (
    MOVES,
    PRODUCTS,
    cast_node,
    classifier_nodes,
    depending_nodes,
    rank,
    result_kind,
    stored_kinds,
)
from aoft_exporters.graph.tf32 import with_tf32_products

__all__ = ["emulated", "left_in_float", "low_results"]


def emulated(proto: Any, *, rounded: bool = True) -> Any:
    """A float32 graph that computes the results of a low-precision graph.

    It serves runtimes that have no kernels in low precision or do not round between operators. Sums
    within a product are in float32, as on GPUs. Attention is computed in the steps of its
    definition. Weights remain stored in low precision.

    Args:
        proto: A graph of ``typed``, or a float32 graph whose metadata have the precision ``tf32``;
            it is not changed.
        rounded: Round every result to its precision. Without rounding, results beyond the range
            keep their magnitude.

    Returns:
        A new ONNX model with the same inputs, outputs, initialisers and metadata, but for the
        precision, which is ``fp32``.
    """
    import onnx

    result = spelled_out(proto)
    for entry in result.metadata_props:
        if entry.key == "precision":
            precision, entry.value = entry.value, "fp32"
            if precision == "tf32":
                return with_tf32_products(result)
    float32 = onnx.TensorProto.FLOAT
    kinds = stored_kinds(result)
    stored = {name: f"{name}.stored" for name in kinds}
    nodes = [cast_node(name, result_name, float32) for name, result_name in stored.items()]
    for node in list(result.graph.node):
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
        Their names, each with the tensor's name in the float32 graph before ``typed``. Tensors
        between the steps of an attention have the names that ``spelled_out`` gives them.
    """
    kinds, results = stored_kinds(proto), {}
    for node in spelled_out(proto).graph.node:
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
        node.name
        if node.op_type == "Attention"
        else next((name for name in node.input if name in weights), node.name)
        for i, node in enumerate(graph.node)
        if node.op_type in PRODUCTS
        and i in images
        and i not in classifier
        and node.output[0] not in low
    ]
