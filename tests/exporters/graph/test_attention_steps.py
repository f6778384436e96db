"""The steps of an Attention compute what ONNX's own evaluator computes for the operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from aoft_exporters.graph.attention_steps import spelled_out, step_prefix

LOW = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16, "fp32": TensorProto.FLOAT}


def attention(kind: int, axes: int, mask: bool, softmax: int | None, scale: float = 0.25) -> Any:
    """A graph of one Attention in a type, with inputs and output in float32."""
    shape: list[Any] = ["batch", 5, 32] if axes == 3 else ["batch", 2, 5, 16]
    heads = {"q_num_heads": 2, "kv_num_heads": 2} if axes == 3 else {}
    precision = {} if softmax is None else {"softmax_precision": softmax}
    names = ["q", "k", "v", "m"] if mask else ["q", "k", "v"]
    shapes: dict[str, list[Any]] = {name: [1, 2, 5, 5] if name == "m" else shape for name in names}
    nodes = [helper.make_node("Cast", [n], [f"{n}.low"], to=kind) for n in names]
    low = [f"{name}.low" for name in names]
    options: dict[str, Any] = {**heads, **precision, "scale": scale}
    nodes += [
        helper.make_node("Attention", low, ["y.low"], name="one", **options),
        helper.make_node("Cast", ["y.low"], ["y"], to=TensorProto.FLOAT),
    ]
    info = helper.make_tensor_value_info
    inputs = [info(name, TensorProto.FLOAT, shapes[name]) for name in names]
    graph = helper.make_graph(nodes, "g", inputs, [info("y", TensorProto.FLOAT, shape)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def evaluated(proto: Any, feed: dict[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    evaluator: Any = ReferenceEvaluator(proto)
    result: NDArray[np.float32] = evaluator.run(None, feed)[0]
    return result


@pytest.mark.parametrize("softmax", [None, TensorProto.FLOAT])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("axes", [3, 4])
@pytest.mark.parametrize("precision", LOW)
def test_the_steps_give_the_operators_values(
    precision: str, axes: int, mask: bool, softmax: int | None
) -> None:
    proto = attention(LOW[precision], axes, mask, softmax)
    steps = spelled_out(proto)
    onnx.checker.check_model(steps, full_check=True)
    assert "Attention" not in {node.op_type for node in steps.graph.node}
    generator = np.random.default_rng(0)
    shapes = {
        v.name: [d.dim_value or 3 for d in v.type.tensor_type.shape.dim] for v in proto.graph.input
    }
    feed = {n: 2 * generator.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    expected, found = evaluated(proto, feed), evaluated(steps, feed)
    assert np.ptp(expected) > 1
    step = {"fp16": 2.0**-11, "bf16": 2.0**-8, "fp32": 2.0**-22}[precision]
    np.testing.assert_allclose(found, expected, rtol=0, atol=step * np.abs(expected).max())
    assert np.mean(found == expected) > 0.9  # most values have the same bits


def test_the_softmax_of_the_steps_is_in_the_operators_softmax_precision() -> None:
    for softmax, expected in ((None, TensorProto.FLOAT16), (TensorProto.FLOAT, TensorProto.FLOAT)):
        steps = spelled_out(attention(TensorProto.FLOAT16, 3, False, softmax))
        inferred = onnx.shape_inference.infer_shapes(steps).graph
        types = {v.name: v.type.tensor_type.elem_type for v in inferred.value_info}
        (node,) = (n for n in steps.graph.node if n.op_type == "Softmax")
        assert types[node.input[0]] == types[node.output[0]] == expected
        assert types["one/scores"] == types["one/shares"] == TensorProto.FLOAT16


def test_a_graph_is_not_changed_and_one_without_attention_stays_the_same() -> None:
    proto = attention(TensorProto.FLOAT16, 4, True, None)
    before = proto.SerializeToString()
    steps = spelled_out(proto)
    assert proto.SerializeToString() == before
    assert spelled_out(steps) == steps
    (node,) = (n for n in proto.graph.node if n.op_type == "Attention")
    inner = [name for n in steps.graph.node for name in n.output if name.startswith("one/")]
    assert step_prefix(node) == "one/"
    assert {"one/scores", "one/masked", "one/shares"} <= set(inner)
