"""Conversion of graphs to low precision: which tensors are rounded, and the results."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from specs import export_spec
from torch import nn

from aoft_deploy.cli.export import main
from aoft_deploy.errors import SettingError, UnknownNameError
from aoft_deploy.tuning.merging import merge
from aoft_deploy.tuning.tuned_model import TunedModel
from aoft_exporters.graph.attention_lowering import ATTENTION_OPSET
from aoft_exporters.graph.emulation import emulated, left_in_float, low_results
from aoft_exporters.graph.low_precision import OPSETS, PRECISIONS, typed
from aoft_exporters.graph.models import plain_graph
from aoft_exporters.graph.operators import ELEMENTWISE, MOVES, PRODUCTS

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
    """A merged model with five tokens."""
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
    """A graph of three products, the last of which is the classifier, and an input for it."""
    make, info = helper.make_node, helper.make_tensor_value_info
    x = np.array(left, np.float32).reshape(1, 1, 1, -1)
    eye = np.eye(len(weight[0]), dtype=np.float32)
    nodes = [make("MatMul", ["x", "w"], ["a"]), make("MatMul", ["a", "eye"], ["b"])]
    nodes += [make("MatMul", ["b", "head"], ["logits"])]
    stored = {"w": np.array(weight, np.float32), "eye": eye, "head": eye}
    proto = helper.make_graph(
        nodes,
        "g",
        [info("x", TensorProto.FLOAT, ["batch", 1, 1, len(left)])],
        [info("logits", TensorProto.FLOAT, ["batch", 1, 1, len(eye)])],
        [numpy_helper.from_array(values, name) for name, values in stored.items()],
    )
    opsets = [helper.make_opsetid("", 20)]
    return helper.make_model(proto, opset_imports=opsets, ir_version=10), x


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_operator_accepts_the_precision_in_its_opset(precision: str) -> None:
    kind = {"fp16": "tensor(float16)", "bf16": "tensor(bfloat16)"}[precision]
    for name in PRODUCTS | ELEMENTWISE | MOVES:
        opset = ATTENTION_OPSET if name == "Attention" else OPSETS[precision]
        schema = onnx.defs.get_schema(name, opset)
        assert any(kind in t.allowed_type_strs for t in schema.type_constraints), name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_converted_graph_is_valid_and_keeps_inputs_outputs_names_and_metadata(
    precision: str, graph: Any
) -> None:
    before = graph.SerializeToString()
    for result in (typed(graph, precision), emulated(typed(graph, precision))):
        onnx.checker.check_model(result, full_check=True)
        for field in ("input", "output"):
            assert list(getattr(result.graph, field)) == list(getattr(graph.graph, field))
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


def test_an_fp16_graph_agrees_with_its_emulation(graph: Any) -> None:
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


def test_the_emulation_shows_results_beyond_the_range_of_fp16() -> None:
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
def test_a_fleets_task_parameters_stay_in_float32_and_logits_agree(
    precision: str, fleet: Any
) -> None:
    kinds = {i.name: i.data_type for i in typed(fleet, precision).graph.initializer}
    assert kinds["bank"] == kinds["heads"] == TensorProto.FLOAT
    assert KINDS[precision] in kinds.values()
    feed = {"pixel_values": images(4), "task": np.array([0, 1, 1, 0])}
    exact, rounded = run(fleet, **feed), run(emulated(typed(fleet, precision)), **feed)
    assert 1e-6 < np.abs(exact - rounded).max() < 0.05 * np.ptp(exact)


SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "siglip": ("vit_base_patch16_siglip_224", SMALL_VIT),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)},
    ),
    "beit": ("beit_base_patch16_224", SMALL_VIT),
    "convnext": ("convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32)}),
}
"""Attention pooling with a learned query; masks, shifts and position biases; convolutions."""


@functools.cache
def architecture_and_graph(architecture: str, opset: int) -> tuple[nn.Module, Any]:
    """A model with random weights, and its graph in float32."""
    name, arguments = ARCHITECTURES[architecture]
    model = timm.create_model(name, num_classes=5, **arguments).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    spec = export_spec(32, False, (0.5,) * 3, (0.5,) * 3, {})
    return model, plain_graph(model, spec, opset=opset)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("architecture", "opset"),
    [
        *((each, 20) for each in ARCHITECTURES),
        ("siglip", ATTENTION_OPSET),
        ("beit", ATTENTION_OPSET),
    ],
)
def test_other_architectures_agree_with_pytorch_in_the_precision(
    architecture: str, opset: int, precision: str
) -> None:
    model, graph = copy.deepcopy(architecture_and_graph(architecture, opset))
    low = typed(graph, precision)
    onnx.checker.check_model(low, full_check=True)
    attentions = [node for node in low.graph.node if node.op_type == "Attention"]
    assert bool(attentions) is (opset == ATTENTION_OPSET)
    x = np.random.default_rng(0).normal(size=(6, 3, 32, 32)).astype(np.float32)
    found = run(emulated(low), pixel_values=x)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    with torch.inference_mode():
        exact = model.double()(torch.from_numpy(x).double()).numpy()
        half = model.to(dtype)(torch.from_numpy(x).to(dtype)).float().numpy()
    error, pytorch_error = np.abs(found - exact).max(), np.abs(half - exact).max()
    step = {"fp16": 2.0**-11, "bf16": 2.0**-8}[precision] * np.abs(exact).max()
    assert (
        step / 10 < error < min(2 * pytorch_error, 20 * step)
    )  # PyTorch rounds norms and sums too
    kinds = {i.name: i.data_type for i in low.graph.initializer}
    products = [n for n, p in model.named_parameters() if p.ndim > 1 and n in kinds]
    products = [n for n in products if "embed" not in n or "proj" in n]
    config: Any = model.pretrained_cfg
    classifier = config["classifier"]
    float32 = {n for n in products if kinds[n] == TensorProto.FLOAT}
    assert (
        {f"{classifier}.weight"}
        <= float32
        <= {f"{classifier}.weight", "cls_token"}
        | {n for n in products if n.endswith(("latent", "gamma"))}
    )
    assert kinds.get("pos_embed", TensorProto.FLOAT) == TensorProto.FLOAT
    assert left_in_float(low) == []


@pytest.mark.parametrize("precision", PRECISIONS)
def test_attention_is_in_the_precision_and_its_softmax_in_float32(precision: str) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32, depth=2).eval()
    spec = export_spec(32, False, (0.5,) * 3, (0.5,) * 3, {})
    low = typed(plain_graph(model, spec, opset=ATTENTION_OPSET), precision)
    inferred = onnx.shape_inference.infer_shapes(low, strict_mode=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in inferred.value_info}
    assert low.opset_import[0].version == ATTENTION_OPSET
    attentions = [node for node in low.graph.node if node.op_type == "Attention"]
    norms = [node for node in low.graph.node if node.op_type == "LayerNormalization"]
    assert (len(attentions), len(norms)) == (2, 5)
    for node in attentions:
        names = [*node.input, *node.output]
        assert {types[name] for name in names} == {KINDS[precision]}
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        assert given["softmax_precision"] == TensorProto.FLOAT
    assert {types[node.output[0]] for node in norms} == {TensorProto.FLOAT}
    inner = {"attention_0/scores", "attention_0/shares", "attention_1/q_scaled"}
    assert inner <= set(low_results(low))


@pytest.mark.parametrize("opset", [20, ATTENTION_OPSET])
def test_the_fp16_graph_agrees_with_onnxs_numpy_evaluator(
    opset: int, graph: Any, make_tuned: Callable[..., TunedModel]
) -> None:
    x = images(3)
    if opset == ATTENTION_OPSET:
        spec = export_spec(16, False, (0.5,) * 3, (0.5,) * 3, {})
        graph = plain_graph(merge(make_tuned("rlrr")), spec, opset=opset)
    low = typed(graph, "fp16")
    evaluator: Any = ReferenceEvaluator(low)
    (evaluated,) = evaluator.run(None, {"pixel_values": x})
    rounded = run(emulated(low), pixel_values=x)
    exact = run(graph, pixel_values=x)
    step = 2.0**-11 * np.abs(exact).max()  # the order of rounding differs
    assert np.abs(evaluated - rounded).max() < 4 * step
    assert step / 10 < np.abs(rounded - exact).max() < 4 * step
    assert np.abs(evaluated - exact).max() > 0


def test_low_precision_results_are_listed_with_their_float32_names() -> None:
    proto, _ = product([1.0, 2.0], [[1.0, 2.0], [3.0, 4.0]])
    assert low_results(typed(proto, "fp16")) == {"x.fp16": "x", "a": "a", "b": "b"}
    kept = typed(proto, "fp16", {"a"})
    assert low_results(kept) == {}
    assert left_in_float(kept) == ["w", "eye"]
    assert low_results(typed(proto, "fp16", {"x"})) == {"a.fp16": "a", "b": "b"}
    assert left_in_float(typed(proto, "fp16", {"x"})) == ["w"]


def test_unknown_precisions_and_branches_are_refused(graph: Any) -> None:
    with pytest.raises(UnknownNameError, match="Unknown precision of a typed graph 'fp8'"):
        typed(graph, "fp8")
    branch = helper.make_graph([], "b", [], [])
    proto, _ = product([1.0], [[1.0]])
    proto.graph.node.append(
        helper.make_node("If", ["c"], ["d"], then_branch=branch, else_branch=branch)
    )
    with pytest.raises(SettingError, match=r"branches \(If\), and branches cannot be"):
        typed(proto, "bf16")
