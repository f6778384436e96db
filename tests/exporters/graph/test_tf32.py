"""TF32 is emulated by rounding the factors of products as an independent formula does."""

from __future__ import annotations

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

from aoft_exporters.graph.emulation import emulated
from aoft_exporters.graph.models import plain_graph


def tf32(values: NDArray[Any]) -> NDArray[np.float32]:
    """Round to ten mantissa bits, to nearest and ties to even, on the bits of float32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    bits += 0xFFF + (bits >> 13 & 1)
    return (bits & ~np.uint64(0x1FFF)).astype(np.uint32).view(np.float32)


def run(proto: Any, **feed: NDArray[Any]) -> NDArray[np.float32]:
    import onnxruntime

    ort: Any = onnxruntime
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    result: NDArray[np.float32] = session.run(None, feed)[0]
    return result


def model(nodes: list[Any], precision: str, opset: int = 20, **weights: NDArray[Any]) -> Any:
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", TensorProto.FLOAT, None)],
        [info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)
    helper.set_model_props(proto, {"precision": precision, "classes": "[]"})
    return proto


def test_rounding_is_to_nearest_with_ties_to_even() -> None:
    generator = np.random.default_rng(0)
    exponents = generator.integers(-30, 30, 20000).astype(np.float32)
    wide = generator.normal(size=20000).astype(np.float32) * np.float32(10) ** exponents
    ties = np.arange(2**11, 2**12, dtype=np.float32)  # 12 significant bits: every second is a tie
    x = np.concatenate([wide, ties, -ties, [0.0, -0.0, 1.0]]).astype(np.float32)[:, None]
    one = np.ones((1, 1), np.float32)
    proto = model([helper.make_node("MatMul", ["x", "w"], ["y"])], "tf32", w=one)
    found = run(emulated(proto), x=x)
    np.testing.assert_array_equal(found, tf32(x))
    assert np.mean(found != x) > 0.8


def test_both_factors_are_rounded_and_a_bias_is_not() -> None:
    generator = np.random.default_rng(0)
    w, b = generator.normal(size=(8, 4)), generator.normal(size=4)
    x = generator.normal(size=(3, 8)).astype(np.float32)
    low = tf32(x).astype(np.float64) @ tf32(w)
    gemm = model([helper.make_node("Gemm", ["x", "w", "b"], ["y"])], "tf32", w=w, b=b)
    np.testing.assert_allclose(run(emulated(gemm), x=x), low + b, atol=1e-6)
    assert np.abs(run(gemm, x=x) - (low + b)).max() > 1e-4
    kernel = generator.normal(size=(5, 3, 2, 2))
    conv = model(
        [helper.make_node("Conv", ["x", "w", "b"], ["y"], strides=[2, 2])],
        "tf32",
        w=kernel,
        b=generator.normal(size=5),
    )
    image = generator.normal(size=(2, 3, 4, 4)).astype(np.float32)
    bias = numpy_helper.to_array(conv.graph.initializer[1]).copy()
    expected = nn.functional.conv2d(
        torch.from_numpy(tf32(image)).double(),
        torch.from_numpy(tf32(kernel)).double(),
        torch.from_numpy(bias).double(),
        stride=2,
    ).numpy()
    np.testing.assert_allclose(run(emulated(conv), x=image), expected, atol=1e-5)


def test_only_a_graph_whose_metadata_say_tf32_is_rounded() -> None:
    generator = np.random.default_rng(0)
    w, x = generator.normal(size=(8, 4)), generator.normal(size=(3, 8)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    plain = model(nodes, "fp32", w=w)
    assert emulated(plain) == plain
    low = emulated(model(nodes, "tf32", w=w))
    assert {e.key: e.value for e in low.metadata_props} == {"precision": "fp32", "classes": "[]"}
    assert not np.array_equal(run(low, x=x), run(plain, x=x))


def rounded_products(module: nn.Module, x: torch.Tensor, opset: int) -> torch.Tensor:
    """A timm ViT in float64 whose linear maps, convolution and attention have TF32 factors.

    Until opset 20 the scale of attention is that of q; the operator shares it between q and k.
    """
    exponents = (-0.5, 0) if opset == 20 else (-0.25, -0.25)

    def low(tensor: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(tf32(tensor.detach().float().numpy())).double()

    functional: Any = nn.functional
    linear, conv = functional.linear, nn.Conv2d._conv_forward

    def attention(q: Any, k: Any, v: Any, **options: Any) -> Any:
        q, k = (x * x.shape[-1] ** exponent for x, exponent in zip((q, k), exponents, strict=True))
        scores = low(q) @ low(k).mT
        return low(scores.softmax(-1)) @ low(v)

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(functional, "linear", lambda x, w, b=None: linear(low(x), low(w), b))
        patch.setattr(functional, "scaled_dot_product_attention", attention)
        patch.setattr(nn.Conv2d, "_conv_forward", lambda s, x, w, b: conv(s, low(x), low(w), b))
        logits: torch.Tensor = module.double()(x.double())
    return logits


@pytest.mark.parametrize("opset", [20, 23])
def test_a_vit_agrees_with_pytorch_with_rounded_factors(opset: int) -> None:
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32, depth=1).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    spec = export_spec(32, False, (0.5,) * 3, (0.5,) * 3, {})
    proto = plain_graph(vit, spec, opset=opset)
    helper.set_model_props(proto, {"precision": "tf32"})
    x = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)
    low, exact = run(emulated(proto), pixel_values=x), run(proto, pixel_values=x)
    onnx.checker.check_model(emulated(proto), full_check=True)
    expected = rounded_products(vit, torch.from_numpy(x), opset).numpy()
    errors = [np.sqrt(np.square(each - expected).mean()) for each in (exact, low)]
    assert errors[0] > 1e-4 * np.abs(expected).max()
    assert errors[1] < 0.4 * errors[0]  # float32 sums can round the next factor the other way
