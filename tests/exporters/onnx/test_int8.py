"""int8 weights in an ONNX graph: names, values, range and arithmetic."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from specs import export_spec
from torch import nn

from aoft_exporters.graph.models import plain_graph
from aoft_exporters.onnx import exporter
from aoft_exporters.onnx.int8 import quantised

SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", SMALL_VIT),
    "siglip": ("vit_base_patch16_siglip_224", SMALL_VIT),
    "beit": ("beit_base_patch16_224", SMALL_VIT),
    "eva": ("eva02_tiny_patch14_224", {**SMALL_VIT, "patch_size": 8}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)},
    ),
    "convnext": ("convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32)}),
    "two linear maps after pooling": (
        "convnext_tiny",
        {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32), "head_hidden_size": 24},
    ),
}


def small(architecture: str, classes: int = 5) -> nn.Module:
    """A model with different random weights in every parameter."""
    name, options = ARCHITECTURES[architecture]
    model: nn.Module = timm.create_model(name, num_classes=classes, **options).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def exported(model: nn.Module, path: Path, precision: str) -> Any:
    spec = export_spec(32, False, (0.5,) * 3, (0.5,) * 3, {"classes": "[]"}, precision)
    exporter.export(model, path, spec)
    return onnx.load(path)


def stored(proto: Any) -> dict[str, NDArray[Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def both(request: Any, tmp_path_factory: Any) -> tuple[nn.Module, Any, Any]:
    """A model and its graphs in float32 and int8."""
    model, path = small(request.param), tmp_path_factory.mktemp("int8") / "a.onnx"
    return model, exported(model, path, "fp32"), exported(model, path, "int8")


def test_every_parameter_keeps_its_name_or_gets_a_suffix(
    both: tuple[nn.Module, Any, Any],
) -> None:
    model, exact, small = both
    parameters = {name: p.detach().numpy() for name, p in model.named_parameters()}
    before, after = stored(exact), stored(small)
    products = 0
    for name in parameters.keys() & before.keys():
        thirds = [f"{name}.{letter}" for letter in "qkv"]
        parts = thirds if {thirds[0], f"{thirds[0]}_quantized"} & set(after) else [name]

        def joined(end: str, parts: list[str] = parts) -> NDArray[Any]:
            return np.concatenate([after[part + end] for part in parts], -1)

        if parts[0] in after:
            assert joined("").dtype == np.float32
            assert sorted(joined("").ravel()) == sorted(parameters[name].ravel())
            assert not any(f"{part}_quantized" in after for part in parts)
            continue
        products += 1
        weight, scale, zero_point = map(joined, ("_quantized", "_scale", "_zero_point"))
        assert weight.dtype == np.int8
        assert not zero_point.any()
        np.testing.assert_allclose(
            weight * scale.astype(np.float64), parameters[name].T, atol=scale.max() / 2 * 1.001
        )
    assert products >= 2
    names = {*before, *(f"{name}.{letter}" for name in before for letter in "qkv")}
    ends = ("", "_quantized", "_scale", "_zero_point")
    assert set(after) <= {name + end for name in names for end in ends}


def test_q_k_and_v_share_their_quantised_input_and_give_the_packed_maps_logits(
    tmp_path: Path,
) -> None:
    model, runtime = small("vit"), importlib.import_module("onnxruntime")
    spec = export_spec(32, False, (0.5,) * 3, (0.5,) * 3, {"classes": "[]"}, "int8")
    packed = quantised(plain_graph(model, spec, opset=23))
    separate = exported(model, tmp_path / "a.onnx", "int8")
    images = np.random.default_rng(0).normal(size=(5, 3, 32, 32)).astype(np.float32)
    found = []
    for proto in (packed, separate):
        session: Any = runtime.InferenceSession(
            proto.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        found.append(session.run(None, {"pixel_values": images})[0])
    np.testing.assert_array_equal(found[0], found[1])
    before, after = (Counter(node.op_type for node in p.graph.node) for p in (packed, separate))
    assert after["DynamicQuantizeLinear"] == before["DynamicQuantizeLinear"]
    assert after["MatMulInteger"] == before["MatMulInteger"] + 2 * SMALL_VIT["depth"]
    assert (before["Split"], after["Split"]) == (SMALL_VIT["depth"], 0)


def test_the_classifier_stays_in_float(both: tuple[nn.Module, Any, Any]) -> None:
    model, _, small = both
    config: Any = model.pretrained_cfg
    weight = stored(small)[f"{config['classifier']}.weight"]
    assert weight.dtype == np.float32
    assert 5 in weight.shape


def test_weights_use_seven_bits_so_that_no_pair_of_products_saturates(
    both: tuple[nn.Module, Any, Any],
) -> None:
    weights = [w for w in stored(both[2]).values() if w.dtype == np.int8 and w.ndim > 1]
    assert weights
    for weight in weights:
        largest = np.abs(weight.astype(np.int64)).max(0)
        assert largest.max() in (63, 64)
        assert 2 * 255 * largest.max() < 2**15  # what AVX2's vpmaddubsw adds, two by two
        assert (largest >= 63).mean() > 0.9  # every output channel uses the full range


def test_int8_products_agree_with_integer_arithmetic_in_numpy() -> None:
    """x is uint8 with one range, W is int8 with one range per column; sums are integers."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(3, 8)).astype(np.float32)
    weight = (generator.normal(size=(8, 6)) * 10.0 ** np.arange(-3, 3)).astype(np.float32)
    head = generator.normal(size=(6, 2)).astype(np.float32)
    make, info = helper.make_node, helper.make_tensor_value_info
    nodes = [make("MatMul", ["x", "w"], ["a"], "first")]
    nodes.append(make("MatMul", ["a", "h"], ["logits"], "classifier"))
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", TensorProto.FLOAT, ["batch", 8])],
        [info("logits", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(head, "h")],
    )
    proto = quantised(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))
    runtime: Any = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    step = (high - low) / 255
    zero = round(-low / step)
    integers = np.clip(np.rint(x / step) + zero, 0, 255)
    scales = np.abs(weight).max(0).astype(np.float64) / 64
    product = (integers - zero) @ np.rint(weight / scales) * step * scales
    (found,) = session.run(None, {"x": x})
    np.testing.assert_allclose(found, product @ head, rtol=1e-4, atol=1e-4)


def test_a_quantised_gemm_with_a_bias_keeps_its_names(tmp_path: Path) -> None:
    """Of two maps of pooled features, the first is quantised; the second is the classifier."""
    names = set(stored(exported(small("two linear maps after pooling"), tmp_path / "a", "int8")))
    fc = "head.pre_logits.fc"
    assert {f"{fc}.weight_quantized", f"{fc}.weight_scale", f"{fc}.weight_zero_point"} <= names
    assert {f"{fc}.bias", "head.fc.weight", "head.fc.bias"} <= names
    assert not any("_Transposed" in name for name in names)
