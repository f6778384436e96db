from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from torch import nn

from aoft_exporters.graph.attention_lowering import ATTENTION_OPSET
from aoft_exporters.graph.attention_tracing import attention_as_one_node
from aoft_exporters.graph.cache import graph_of

SMALL: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 2},
    "vit_tiny_patch16_224.qk_norm": {"img_size": 32, "depth": 2, "qk_norm": True},
    "beit_base_patch16_224": {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3},
    "eva02_tiny_patch14_224": {"img_size": 28, "depth": 2},
    "deit3_small_patch16_224": {"img_size": 32, "depth": 2},
}


def small(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name.partition(".")[0], num_classes=5, **SMALL[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def graph(model: nn.Module, side: int, opset: int, separate: bool = False) -> Any:
    example = {"pixel_values": (torch.zeros(2, 3, side, side), "batch")}
    proto = graph_of(model, example, None, opset=opset, separate=separate)
    onnx.checker.check_model(proto, full_check=opset == 20)
    return proto


def logits(proto: Any, x: torch.Tensor) -> Any:
    import onnxruntime

    ort: Any = onnxruntime
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"pixel_values": x.numpy()})[0]


def kinds(proto: Any) -> Counter[str]:
    return Counter(node.op_type for node in proto.graph.node)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("opset", "separate"), [(20, False), (20, True), (23, False)])
def test_every_lowering_gives_the_models_logits(name: str, opset: int, separate: bool) -> None:
    model = small(name)
    side = SMALL[name]["img_size"]
    x = torch.randn(3, 3, side, side)
    with torch.no_grad():
        expected = model(x).numpy()
    assert np.ptp(expected) > 0.1
    proto = graph(model, side, opset, separate)
    for batch in (1, 3):
        np.testing.assert_allclose(logits(proto, x[:batch]), expected[:batch], atol=2e-5, rtol=0)
    counts = kinds(proto)
    assert counts["Attention"] == (2 if opset >= ATTENTION_OPSET else 0)
    assert counts["Softmax"] == (0 if opset >= ATTENTION_OPSET else 2)
    assert proto.opset_import[0].version == opset
    assert {node.domain for node in proto.graph.node} == {""}


def test_attention_on_timms_packed_qkv_takes_two_nodes() -> None:
    counts = kinds(graph(small("vit_tiny_patch16_224"), 32, ATTENTION_OPSET))
    assert counts["Split"] == counts["Attention"] == 2
    assert counts["Transpose"] == 1  # of the patch embedding
    assert counts["Slice"] + counts["Squeeze"] + counts["Shape"] <= 2  # of the class token
    assert sum(counts.values()) == 2 * 15 + 11


def test_separate_maps_hold_the_columns_of_the_packed_weight() -> None:
    model = small("vit_tiny_patch16_224")
    proto = graph(model, 32, 20, separate=True)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    weight = model.state_dict()["blocks.1.attn.qkv.weight"].numpy().T
    parts = [stored[f"blocks.1.attn.qkv.weight.{letter}"] for letter in "qkv"]
    np.testing.assert_array_equal(np.concatenate(parts, 1), weight)
    assert "blocks.1.attn.qkv.weight" not in stored
    assert kinds(proto)["Split"] == 0


def test_a_model_without_attention_keeps_opset_20() -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=3).eval()
    proto = graph_of(
        model, {"pixel_values": (torch.zeros(2, 3, 64, 64), "batch")}, None, opset=ATTENTION_OPSET
    )
    assert proto.opset_import[0].version == 20


class Attention(nn.Module):
    """One attention with the given options."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = x * self.scale
        function = nn.functional.scaled_dot_product_attention
        return function(q, x, x, **self.options).flatten(1)[:, :3]


@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {"attn_mask": torch.tensor([[True, False, True, True]])}]
)
def test_causal_and_boolean_masks_are_exported_by_torch(options: dict[str, Any]) -> None:
    model, x = Attention(**options).eval(), torch.randn(2, 2, 4, 8)
    proto = graph_of(model, {"pixel_values": (x, "batch")}, None, opset=ATTENTION_OPSET)
    assert kinds(proto)["Attention"] == 0
    np.testing.assert_allclose(logits(proto, x), model(x).detach().numpy(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("axes", [3, 5])
@pytest.mark.parametrize("opset", [20, 23])
def test_attention_with_three_or_five_axes_is_one_node_too(axes: int, opset: int) -> None:
    x = torch.randn(3, *(2, 2)[: axes - 3], 4, 8)
    model = Attention(attn_mask=torch.randn(4, 4)).eval()
    proto = graph_of(model, {"pixel_values": (x, "batch")}, None, opset=opset)
    assert kinds(proto)["Softmax" if opset == 20 else "Attention"] == 1
    for batch in (1, 3):
        np.testing.assert_allclose(
            logits(proto, x[:batch]), model(x[:batch]).detach().numpy(), atol=1e-6, rtol=0
        )


def test_torchs_function_is_restored_after_an_error() -> None:
    before = nn.functional.scaled_dot_product_attention
    with pytest.raises(ZeroDivisionError), attention_as_one_node():
        assert nn.functional.scaled_dot_product_attention is not before
        raise ZeroDivisionError
    assert nn.functional.scaled_dot_product_attention is before
