"""Low precision written into a graph: what is rounded, what is not, and what it computes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from aoft_deploy.cli.export import main
from aoft_deploy.errors import SettingError, UnknownNameError
from aoft_exporters.typed import BETWEEN, MOVES, OPSETS, PRECISIONS, PRODUCTS, emulated, typed

KINDS = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def run(proto: Any, **feed: NDArray[Any]) -> NDArray[np.float32]:
    onnxruntime: Any = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, ["CPUExecutionProvider"]
    )
    logits: NDArray[np.float32] = session.run(None, feed)[0]
    return logits


def images(batch: int) -> NDArray[np.float32]:
    return np.random.default_rng(batch).normal(size=(batch, 3, 16, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def graph(checkpoint: Path, backbone_weights: Path, tmp_path_factory: Any) -> Any:
    """A merged model of five tokens."""
    path = tmp_path_factory.mktemp("typed") / "a.onnx"
    options = ["--merge", checkpoint, "--backbone-weights", backbone_weights, "--to", "triton"]
    assert main([*map(str, options), "-o", str(path.parent / "a")]) == 0
    return onnx.load(path.parent / "a" / "1" / "model.onnx")


@pytest.fixture(scope="module")
def fleet(
    make_checkpoint: Callable[..., Path], backbone_weights: Path, tmp_path_factory: Any
) -> Any:
    """Two tasks of one backbone."""
    folder = tmp_path_factory.mktemp("typed")
    for name in "ab":
        (folder / f"{name}.ckpt").write_bytes(make_checkpoint("aoft-lora-star").read_bytes())
    options = ["--fleet", folder / "a.ckpt", folder / "b.ckpt", "--to", "triton"]
    options += ["--backbone-weights", backbone_weights, "-o", folder / "out"]
    assert main([str(option) for option in options]) == 0
    return onnx.load(folder / "out" / "1" / "model.onnx")


def product(left: list[float], weight: list[list[float]]) -> tuple[Any, NDArray[np.float32]]:
    """A graph whose third product is the classifier, and what to give it."""
    make, info = helper.make_node, helper.make_tensor_value_info
    x = np.array(left, np.float32).reshape(1, 1, 1, -1)
    eye = np.eye(len(weight[0]), dtype=np.float32)
    nodes = [make("MatMul", ["x", "w"], ["a"]), make("MatMul", ["a", "eye"], ["b"])]
    nodes += [make("MatMul", ["b", "head"], ["logits"])]
    stored = {"w": np.array(weight, np.float32), "eye": eye, "head": eye}
    whole = helper.make_graph(
        nodes,
        "g",
        [info("x", TensorProto.FLOAT, ["batch", 1, 1, len(left)])],
        [info("logits", TensorProto.FLOAT, ["batch", 1, 1, len(eye)])],
        [numpy_helper.from_array(values, name) for name, values in stored.items()],
    )
    opsets = [helper.make_opsetid("", 20)]
    return helper.make_model(whole, opset_imports=opsets, ir_version=10), x


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_operator_takes_the_precision_in_its_opset(precision: str) -> None:
    kind = {"fp16": "tensor(float16)", "bf16": "tensor(bfloat16)"}[precision]
    for name in PRODUCTS | BETWEEN | MOVES:
        schema = onnx.defs.get_schema(name, OPSETS[precision])
        assert any(kind in t.allowed_type_strs for t in schema.type_constraints), name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_graph_is_valid_and_its_inputs_outputs_names_and_metadata_stay(
    precision: str, graph: Any
) -> None:
    before = graph.SerializeToString()
    for result in (typed(graph, precision), emulated(typed(graph, precision))):
        onnx.checker.check_model(result, full_check=True)
        for what in ("input", "output"):
            assert list(getattr(result.graph, what)) == list(getattr(graph.graph, what))
        assert list(result.metadata_props) == list(graph.metadata_props)
        names = [[i.name for i in each.graph.initializer] for each in (result, graph)]
        assert names[0] == names[1]
    assert graph.SerializeToString() == before


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_of_products_are_low_and_norms_softmax_residual_and_classifier_are_not(
    precision: str, graph: Any
) -> None:
    result = typed(graph, precision)
    kinds = {i.name: i.data_type for i in result.graph.initializer}
    low = {name for name, kind in kinds.items() if kind == KINDS[precision]}
    block = "blocks.0."
    assert {f"{block}{n}.weight" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")} <= low
    assert {"patch_embed.proj.weight", f"{block}attn.qkv.bias"} <= low
    high = {"norm.weight", f"{block}norm1.bias", "head.weight", "head.bias", "pos_embed"}
    assert not high & low
    inferred = onnx.shape_inference.infer_shapes(result).graph
    types = {v.name: v.type.tensor_type.elem_type for v in inferred.value_info}
    checked = 0
    for node in result.graph.node:
        if node.op_type in ("LayerNormalization", "Softmax"):
            assert types[node.output[0]] == TensorProto.FLOAT
            checked += 1
    sums = [n for n in result.graph.node if n.op_type == "Add" and not set(n.input) & set(kinds)]
    assert all(types[node.output[0]] == TensorProto.FLOAT for node in sums)
    assert (checked, len(sums)) == (4, 2)


def test_fp16_runs_and_computes_what_its_emulation_computes(graph: Any) -> None:
    x = images(7)
    exact, found = run(graph, pixel_values=x), run(typed(graph, "fp16"), pixel_values=x)
    rounded = run(emulated(typed(graph, "fp16")), pixel_values=x)
    assert 1e-6 < np.abs(rounded - exact).max() < 5e-3
    np.testing.assert_allclose(found, rounded, atol=2e-3, rtol=0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_emulation_rounds_as_numpy_does(precision: str) -> None:
    weight = [[1.001, 300.7], [-2.34567, 0.1]]
    proto, x = product([1.23456, 7.654321], weight)
    dtype = helper.tensor_dtype_to_np_dtype(KINDS[precision])
    low_x, low_w = x.astype(dtype).astype(np.float32), np.array(weight).astype(dtype)
    expected = (low_x @ low_w.astype(np.float32)).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(run(emulated(typed(proto, precision)), x=x), expected)
    assert not np.array_equal(run(proto, x=x), expected)


def test_bf16_loses_more_than_fp16_and_keeps_the_answers(graph: Any) -> None:
    x = images(7)
    exact = run(graph, pixel_values=x)
    errors = [
        np.abs(run(emulated(typed(graph, p)), pixel_values=x) - exact).max()
        for p in ("fp16", "bf16")
    ]
    assert 2 * errors[0] < errors[1] < 0.05 * np.ptp(exact)


def test_a_result_beyond_the_range_of_fp16_is_not_hidden() -> None:
    proto, x = product([300.0, 300.0], [[300.0, 1.0], [300.0, 1.0]])
    assert run(proto, x=x).tolist() == [[[[180000.0, 600.0]]]]
    assert not np.isfinite(run(emulated(typed(proto, "fp16")), x=x)).all()
    rounded = run(emulated(typed(proto, "bf16")), x=x)
    np.testing.assert_allclose(rounded, [[[[180000, 600]]]], rtol=0.01)


def test_a_constant_beyond_the_range_of_fp16_keeps_its_operator_in_float32() -> None:
    proto, x = product([1e-3, 1.0], [[1e6, 1.0], [2.0, 1.0]])
    result = typed(proto, "fp16")
    kinds = {i.name: i.data_type for i in result.graph.initializer}
    assert kinds == {"w": TensorProto.FLOAT, "eye": TensorProto.FLOAT16, "head": TensorProto.FLOAT}
    np.testing.assert_allclose(run(result, x=x), run(proto, x=x), rtol=1e-3)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_numbers_of_a_fleets_tasks_stay_float32_and_answers_agree(
    precision: str, fleet: Any
) -> None:
    kinds = {i.name: i.data_type for i in typed(fleet, precision).graph.initializer}
    assert kinds["bank"] == kinds["heads"] == TensorProto.FLOAT
    assert KINDS[precision] in kinds.values()
    feed = {"pixel_values": images(4), "task": np.array([0, 1, 1, 0])}
    exact, rounded = run(fleet, **feed), run(emulated(typed(fleet, precision)), **feed)
    assert 1e-6 < np.abs(exact - rounded).max() < 0.05 * np.ptp(exact)


def test_another_precision_and_branches_are_refused(graph: Any) -> None:
    with pytest.raises(UnknownNameError, match="Unknown precision of a typed graph 'fp8'"):
        typed(graph, "fp8")
    branch = helper.make_graph([], "b", [], [])
    proto, _ = product([1.0], [[1.0]])
    proto.graph.node.append(
        helper.make_node("If", ["c"], ["d"], then_branch=branch, else_branch=branch)
    )
    with pytest.raises(SettingError, match=r"branches \(If\), and bf16 is not written into"):
        typed(proto, "bf16")
