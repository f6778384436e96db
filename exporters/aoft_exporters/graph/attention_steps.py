"""Write ONNX's operator Attention as the products and the softmax that define it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from aoft_exporters.graph.operators import cast_node, result_kind, stored_kinds

__all__ = ["spelled_out", "step_prefix"]

SOFTMAX = "softmax_precision"


def spelled_out(proto: Any) -> Any:
    """Replace every Attention of a model with the steps of its definition.

    These are q·√scale, k·√scale, their product, the mask, the softmax in ``softmax_precision``, and
    the product with v. Each result has the type of q. Runtimes that fuse the steps round less.

    Args:
        proto: An ONNX model whose attentions are those of ``attention_lowering.lower``; it is not
            changed.

    Returns:
        A new ONNX model with the same inputs, outputs, initialisers and metadata.
    """
    import onnx

    result = onnx.ModelProto()
    result.CopyFrom(proto)
    kinds = stored_kinds(proto)
    nodes, constants = list[Any](), dict[str, Any]()
    for node in proto.graph.node:
        kind = result_kind(node, kinds)
        nodes += _steps(node, kind, constants) if node.op_type == "Attention" else [node]
        if kind is not None:
            kinds.update(dict.fromkeys(node.output, kind))
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    result.graph.initializer.extend(constants.values())
    return result


def step_prefix(node: Any) -> str:
    """Prefix of the tensors between the steps of an Attention."""
    return f"{node.name or node.output[0]}/"


def _steps(node: Any, kind: int | None, constants: dict[str, Any]) -> Iterator[Any]:
    """The nodes that compute an Attention; their constants are added to ``constants``.

    Args:
        node: An Attention without cache.
        kind: Type of q, k and v in low precision; None in float32.
        constants: Initialisers by name.
    """
    from onnx import TensorProto, helper

    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    kind = TensorProto.FLOAT if kind is None else kind
    softmax = given.get(SOFTMAX, kind)
    prefix = step_prefix(node)
    factor = _constant(
        f"sqrt_{given['scale']!r}.{kind}", math.sqrt(given["scale"]), kind, constants
    )

    def step(kind: str, name: str, *inputs: str, **attributes: Any) -> Any:
        return helper.make_node(kind, inputs, [name], name, **attributes)

    sides = {letter: name for letter, name in zip("qkv", node.input, strict=False)}
    heads = given.get("q_num_heads")
    if heads:
        shape = _shape(f"heads_{heads}", [0, 0, heads, -1], constants)
        for letter, name in sides.items():
            yield step("Reshape", f"{prefix}{letter}_tokens", name, shape)
            perm = [0, 2, 3, 1] if letter == "k" else [0, 2, 1, 3]
            yield step("Transpose", f"{prefix}{letter}", f"{prefix}{letter}_tokens", perm=perm)
            sides[letter] = f"{prefix}{letter}"
    else:
        yield step("Transpose", f"{prefix}k", sides["k"], perm=[0, 1, 3, 2])
        sides["k"] = f"{prefix}k"
    for letter in "qk":
        yield step("Mul", f"{prefix}{letter}_scaled", sides[letter], factor)
    scores = f"{prefix}scores"
    yield step("MatMul", scores, f"{prefix}q_scaled", f"{prefix}k_scaled")
    if len(node.input) > 3:
        yield step("Add", f"{prefix}masked", scores, node.input[3])
        scores = f"{prefix}masked"
    if softmax != kind:
        yield cast_node(scores, f"{prefix}softmax_scores", softmax)
        yield step("Softmax", f"{prefix}softmax_shares", f"{prefix}softmax_scores", axis=-1)
        yield cast_node(f"{prefix}softmax_shares", f"{prefix}shares", kind)
    else:
        yield step("Softmax", f"{prefix}shares", scores, axis=-1)
    if not heads:
        yield step("MatMul", node.output[0], f"{prefix}shares", sides["v"])
        return
    yield step("MatMul", f"{prefix}heads", f"{prefix}shares", sides["v"])
    yield step("Transpose", f"{prefix}tokens", f"{prefix}heads", perm=[0, 2, 1, 3])
    joined = _shape("joined_heads", [0, 0, -1], constants)
    yield step("Reshape", node.output[0], f"{prefix}tokens", joined)


def _constant(name: str, value: float, kind: int, constants: dict[str, Any]) -> str:
    from onnx import helper, numpy_helper

    dtype = helper.tensor_dtype_to_np_dtype(kind)
    constants[name] = numpy_helper.from_array(np.array(value, np.float32).astype(dtype), name)
    return name


def _shape(name: str, sizes: list[int], constants: dict[str, Any]) -> str:
    from onnx import numpy_helper

    constants[name] = numpy_helper.from_array(np.array(sizes, np.int64), name)
    return name
