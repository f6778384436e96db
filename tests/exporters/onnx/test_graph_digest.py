"""The digest of an ONNX file's graph: the same for other weights alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from aoft_deploy.artefacts.onnx_metadata import seal
from aoft_exporters.onnx.graph_digest import graph_digest


def model(seed: int = 0, scale: float = 0.5, rows: int = 300, alpha: float = 1.0) -> Any:
    """A linear map of random weights, scaled and reshaped by constants."""
    random = np.random.default_rng(seed)
    weight = random.standard_normal((40, rows)).astype(np.float32)
    values: dict[str, NDArray[Any]] = {
        "weight": weight,
        "bias": random.standard_normal(rows).astype(np.float32),
        "scale": np.array(scale, np.float32),
        "shape": np.array([-1, rows // 2, 2], np.int64),
    }
    nodes = [
        helper.make_node("Gemm", ["x", "weight", "bias"], ["mapped"], alpha=alpha),
        helper.make_node("Mul", ["mapped", "scale"], ["scaled"]),
        helper.make_node("Reshape", ["scaled", "shape"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 40])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", rows // 2, 2])],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    onnx.checker.check_model(made)
    return made


def digest(proto: Any, folder: Path) -> str:
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return graph_digest(path)


def test_weights_metadata_and_seal_do_not_change_it(tmp_path: Path) -> None:
    first = digest(model(), tmp_path)
    assert digest(model(seed=1), tmp_path) == first
    described = model(seed=2)
    helper.set_model_props(described, {"classes": "a, b"})
    assert digest(described, tmp_path) == first
    seal(tmp_path / "model.onnx")
    assert graph_digest(tmp_path / "model.onnx") == first


def change_shape_constant(proto: Any) -> None:
    shape = np.array([-1, 75, 4], np.int64)
    proto.graph.initializer[3].CopyFrom(numpy_helper.from_array(shape, "shape"))


def change_operator(proto: Any) -> None:
    proto.graph.node[1].op_type = "Add"


def change_order(proto: Any) -> None:
    node = proto.graph.node[1]
    node.input[0], node.input[1] = node.input[1], node.input[0]


def change_opset(proto: Any) -> None:
    proto.opset_import[0].version = 21


def change_type(proto: Any) -> None:
    bias = numpy_helper.to_array(proto.graph.initializer[1]).astype(np.float16)
    proto.graph.initializer[1].CopyFrom(numpy_helper.from_array(bias, "bias"))


def transpose_weight(proto: Any) -> None:
    weight = numpy_helper.to_array(proto.graph.initializer[0]).reshape(300, 40)
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "weight"))


@pytest.mark.parametrize(
    "change",
    [
        change_shape_constant,
        change_operator,
        change_order,
        change_opset,
        change_type,
        transpose_weight,
    ],
)
def test_every_other_change_does(change: Callable[[Any], None], tmp_path: Path) -> None:
    proto = model()
    first = digest(proto, tmp_path)
    change(proto)
    assert digest(proto, tmp_path) != first


@pytest.mark.parametrize("other", [{"scale": 0.25}, {"rows": 302}, {"alpha": 2.0}])
def test_scalars_sizes_and_attributes_change_it(other: dict[str, Any], tmp_path: Path) -> None:
    assert digest(model(**other), tmp_path) != digest(model(), tmp_path)
