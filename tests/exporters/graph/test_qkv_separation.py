"""A packed map of q, k and v is replaced by three maps that compute the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from aoft_exporters.graph.linked_graph import LinkedGraph
from aoft_exporters.graph.qkv_separation import separate_qkv

BATCH, TOKENS, WIDTH, RANK = 2, 5, 6, 3
FEATURES = 3 * WIDTH
RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((WIDTH, FEATURES)).astype(np.float32)
BIAS = RNG.standard_normal(FEATURES).astype(np.float32)


def packed(blocks: Sequence[tuple[int, int]], *, fused_bias: bool) -> Any:
    """A graph of x W + U V: each block of V is zero but for these columns, as in ``mix_linear``.

    Args:
        blocks: First column of each block, and its number of columns.
        fused_bias: Whether the last row of V is the bias and the last column of U is 1.
    """
    constants = {"weight": WEIGHT, "bias": BIAS, "one": np.float32(1)}
    nodes, inner, outer = [], list[str](), list[str]()
    for i, (first, columns) in enumerate(blocks):
        pads = np.array([0, 0, first, 0, 0, FEATURES - first - columns])
        constants |= {f"pads{i}": pads, f"rows{i}": np.array([0, 0, 0, 0, 0, 0])}
        nodes += [
            helper.make_node("Pad", [f"left{i}", f"pads{i}"], [f"padded{i}"]),
            helper.make_node("Pad", [f"padded{i}", f"rows{i}"], [f"block{i}"]),
        ]
        inner.append(f"inner{i}")
        outer.append(f"block{i}")
    if fused_bias:
        constants |= {
            "ones_shape": np.array([BATCH, TOKENS, 1]),
            "bias_shape": np.array([BATCH, 1, FEATURES]),
        }
        nodes += [
            helper.make_node("Expand", ["one", "ones_shape"], ["ones"]),
            helper.make_node("Expand", ["bias", "bias_shape"], ["biases"]),
        ]
        inner.append("ones")
        outer.append("biases")
    nodes += [
        helper.make_node("Concat", inner, ["u"], axis=-1),
        helper.make_node("Concat", outer, ["v"], axis=-2),
        helper.make_node("MatMul", ["u", "v"], ["thin"]),
        helper.make_node("MatMul", ["x", "weight"], ["product"]),
        helper.make_node("Add", ["product", "thin"], ["qkv"]),
        helper.make_node("Split", ["qkv"], ["q", "k", "v_out"], axis=-1, num_outputs=3),
    ]
    shapes = {"x": [BATCH, TOKENS, WIDTH]}
    for i, (_, columns) in enumerate(blocks):
        shapes |= {f"inner{i}": [BATCH, TOKENS, RANK], f"left{i}": [BATCH, RANK, columns]}
    used = {name for node in nodes for name in node.input}
    return model(nodes, shapes, {n: v for n, v in constants.items() if n in used})


def model(nodes: list[Any], shapes: dict[str, list[int]], constants: dict[str, Any]) -> Any:
    """A model whose outputs are q, k and v."""
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in shapes.items()],
        [
            helper.make_tensor_value_info(name, kind, [BATCH, TOKENS, WIDTH])
            for name in ("q", "k", "v_out")
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def separated(proto: Any) -> Any:
    """A copy of a graph with three maps, whose results the outputs take."""
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    graph = LinkedGraph(result)
    separate_qkv(graph, "qkv", "part")
    if graph.replacements:
        graph.replacements["q"] = [
            helper.make_node("Identity", [f"part/{letter}"], [name])
            for letter, name in zip("qkv", ("q", "k", "v_out"), strict=True)
        ]
    graph.write()
    onnx.checker.check_model(result)
    return result


def answers(proto: Any) -> list[Any]:
    """The outputs for random inputs."""
    rng = np.random.default_rng(1)
    feed = {
        value.name: rng.standard_normal(
            [axis.dim_value for axis in value.type.tensor_type.shape.dim]
        ).astype(np.float32)
        for value in proto.graph.input
    }
    return list(ReferenceEvaluator(proto).run(None, feed))


@pytest.mark.parametrize("fused_bias", [True, False])
@pytest.mark.parametrize(
    ("blocks", "thin"),
    [
        ([(0, WIDTH), (2 * WIDTH, WIDTH)], "qv"),
        ([(WIDTH, 1)], "k"),
        ([(WIDTH - 1, 2)], "qk"),
        ([(0, FEATURES)], "qkv"),
    ],
)
def test_only_thirds_that_the_factor_reaches_get_a_thin_product(
    blocks: list[tuple[int, int]], thin: str, fused_bias: bool
) -> None:
    proto = packed(blocks, fused_bias=fused_bias)
    result = separated(proto)
    for found, expected in zip(answers(result), answers(proto), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    names = {name for node in result.graph.node for name in node.output}
    assert {letter for letter in "qkv" if f"part/{letter}_thin" in names} == set(thin)
    assert "qkv" not in names
    stored = {tensor.name for tensor in result.graph.initializer}
    expected_names = {f"weight.{letter}" for letter in "qkv"}
    expected_names |= {f"bias.{letter}" for letter in "qkv"} if fused_bias else set()
    assert stored & {"weight", "bias", "one"} == set()
    assert {name for name in stored if "." in name} == expected_names


def test_other_sums_stay_packed() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["product"]),
        helper.make_node("Mul", ["product", "product"], ["square"]),
        helper.make_node("Add", ["product", "square"], ["qkv"]),
        helper.make_node("Split", ["qkv"], ["q", "k", "v_out"], axis=-1, num_outputs=3),
    ]
    proto = model(nodes, {"x": [BATCH, TOKENS, WIDTH]}, {"weight": WEIGHT})
    assert separated(proto).graph.node == proto.graph.node
    del proto.graph.node[1]
    proto.graph.node[1].input[1] = "shift"
    shift = helper.make_tensor_value_info("shift", 1, [BATCH, TOKENS, FEATURES])
    proto.graph.input.append(shift)
    assert separated(proto).graph.node == proto.graph.node
