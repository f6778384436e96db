"""Every node that stands for a block becomes the nodes of its kind, with that block's weights."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from aoft_exporters.graph.block_expansion import expanded


def test_each_block_computes_with_its_own_weights_and_shares_constants() -> None:
    generator = np.random.default_rng(0)
    weights = [generator.normal(size=(3, 3)).astype(np.float32) for _ in range(11)]
    paths = [f"backbone.blocks.{i}" for i in range(11)]  # 1 is also the start of 10
    first = {"first": paths[0], "domain": "aoft"}
    nodes = [
        helper.make_node("Block", [before], [after], path=path, **first)
        for before, after, path in zip(
            ["x", *(f"b{i}" for i in range(10))], [f"b{i}" for i in range(11)], paths, strict=True
        )
    ]
    nodes += [
        helper.make_node("Identity", ["b10"], ["logits"]),
        helper.make_node("BlockInput", [], ["input"], index=0, **first),
        helper.make_node("Neg", ["two"], ["minus"]),  # belongs to no block: stays one
        helper.make_node("Transpose", ["blocks.0.weight"], ["turned"]),  # depends on a weight alone
        helper.make_node("MatMul", ["input", "turned"], ["product"]),
        helper.make_node("Mul", ["product", "minus"], [paths[0]]),
    ]
    weight = TensorProto(
        name="blocks.0.weight",
        data_type=TensorProto.FLOAT,
        dims=(3, 3),
        doc_string=json.dumps(["blocks.0.weight", 0, 1, False]),
    )
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3])
        for name in ("x", "logits", paths[0], "product")
    ]
    constant = numpy_helper.from_array(np.array(2 / 3, np.float32), "two")
    graph = helper.make_graph(
        nodes, "g", values[:1], values[1:3], [weight, constant], value_info=values[3:]
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("aoft", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)

    expanded(proto, (paths[0],))

    kinds = [node.op_type for node in proto.graph.node]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        **{"MatMul": 11, "Mul": 11, "Transpose": 11},
        **{"Neg": 1, "Identity": 1},
    }
    assert [value.name for value in proto.graph.output] == ["logits"]
    assert len(proto.graph.value_info) == 11
    names = [tensor.name for tensor in proto.graph.initializer]
    assert sorted(names) == sorted(["two", *(f"blocks.{i}.weight" for i in range(11))])
    for tensor in proto.graph.initializer:
        if tensor.doc_string:
            name, *form = json.loads(tensor.doc_string)
            assert (name, form) == (tensor.name, [0, 1, False])
            tensor.raw_data = weights[int(name.split(".")[1])].tobytes()
            tensor.doc_string = ""
    del proto.opset_import[1]
    onnx.checker.check_model(proto, full_check=True)
    x = generator.normal(size=(2, 3)).astype(np.float32)
    expected = x
    for matrix in weights:
        expected = expected @ matrix.T * np.float32(-2 / 3)
    found: Any = ReferenceEvaluator(proto).run(None, {"x": x})
    np.testing.assert_allclose(found[0], expected, rtol=1e-4)
