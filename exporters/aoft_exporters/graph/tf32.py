"""Emulate TF32 in float32: the factors of every product are rounded to ten mantissa bits.

A GPU reads float32 factors as TF32, which has float32's range and fp16's mantissa, and sums their
products in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from aoft_exporters.graph.operators import PRODUCTS

__all__ = ["with_tf32_products"]

SPLITTER = 2.0**13 + 1
"""Veltkamp's constant: c = x · SPLITTER, c − (c − x) is x rounded to 24 − 13 significant bits."""


def with_tf32_products(proto: Any) -> Any:
    """A float32 graph that computes the results of TF32.

    Rounding is to nearest, ties to even. Magnitudes beyond 2¹¹⁴ become nan, and those below 2⁻¹¹³
    are rounded less.

    Args:
        proto: An ONNX model in float32 without operator Attention; it is not changed.

    Returns:
        A new ONNX model with the same inputs, outputs, initialisers and metadata.
    """
    import onnx

    result = onnx.ModelProto()
    result.CopyFrom(proto)
    nodes, rounded = list[Any](), dict[str, str]()
    for node in list(result.graph.node):
        if node.op_type in PRODUCTS:
            for i, name in enumerate(node.input[:2]):  # a third one is a bias, which is added
                if name not in rounded:
                    rounded[name] = f"{name}.tf32"
                    nodes += _rounding(name, rounded[name])
                node.input[i] = rounded[name]
        nodes.append(node)
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    splitter = np.array(SPLITTER, np.float32)
    result.graph.initializer.append(onnx.numpy_helper.from_array(splitter, "tf32_splitter"))
    return result


def _rounding(name: str, result: str) -> list[Any]:
    """Nodes that round a tensor to TF32."""
    from onnx import helper

    return [
        helper.make_node("Mul", [name, "tf32_splitter"], [f"{result}_scaled"], f"{result}_scaled"),
        helper.make_node("Sub", [f"{result}_scaled", name], [f"{result}_rest"], f"{result}_rest"),
        helper.make_node("Sub", [f"{result}_scaled", f"{result}_rest"], [result], result),
    ]
