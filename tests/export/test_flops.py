"""FLOPs of models, compared with explicit formulas and with graphs of PyTorch's exporter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers.config import set_fused_attn
from torch import nn
from torch.nn import functional as F

from aoft_deploy.export.flops import flops_per_image


@pytest.fixture(params=[True, False], ids=["fused attention", "attention written out"])
def fused(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether timm uses PyTorch's fused attention; restored afterwards."""
    set_fused_attn(request.param)
    yield request.param
    set_fused_attn(True)


def without_weights(name: str, **args: Any) -> nn.Module:
    """A model on the meta device, which takes no memory."""
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name, **args)
    return model.eval()


def vit(side: int, patch: int, width: int, depth: int, classes: int, mlp: int = 4) -> int:
    """Multiplications and additions of a ViT with a class token."""
    patches = (side // patch) ** 2
    tokens = patches + 1
    # per token: qkv 3·d², projection d², MLP 2·mlp·d²; then q·kᵀ and the weighted sum of v
    block = tokens * (4 + 2 * mlp) * width**2 + 2 * tokens**2 * width
    return 2 * (patches * 3 * patch**2 * width + depth * block + width * classes)


def swin(side: int, width: int, depths: tuple[int, ...], window: int, classes: int) -> int:
    """Multiplications and additions of a Swin Transformer (arXiv 2103.14030, equation 2)."""
    grid = side // 4
    total = grid**2 * 3 * 4**2 * width
    for stage, depth in enumerate(depths):
        if stage:  # four neighbours become one of twice the width
            grid, width = grid // 2, 2 * width
            total += grid**2 * (2 * width) * width
        total += depth * (12 * grid**2 * width**2 + 2 * window**2 * grid**2 * width)
    return 2 * (total + width * classes)


def convnext(side: int, widths: tuple[int, ...], depths: tuple[int, ...], classes: int) -> int:
    """Multiplications and additions of a ConvNeXt (arXiv 2201.03545)."""
    grid, before, total = side // 4, 3, 0
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        kernel = 2 if stage else 4
        grid = grid // 2 if stage else grid
        total += grid**2 * kernel**2 * before * width
        total += depth * grid**2 * (7 * 7 * width + 8 * width**2)  # depthwise; up and down by 4
        before = width
    return 2 * (total + before * classes)


def resnet50(side: int, classes: int) -> int:
    """Multiplications and additions of a ResNet-50 with its stride in the 3 x 3 convolutions."""
    grid = side // 2
    total, before = grid**2 * 7 * 7 * 3 * 64, 64
    grid //= 2
    for stage, depth in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(depth):
            stride = 2 if stage and not block else 1
            grid_before, grid = grid, grid // stride
            total += grid_before**2 * before * width + grid**2 * (9 * width**2 + 4 * width**2)
            total += grid**2 * before * 4 * width if not block else 0  # the shortcut
            before = 4 * width
    return 2 * (total + before * classes)


def test_vit_base_takes_35_billion(fused: bool) -> None:
    counted = flops_per_image(without_weights("vit_base_patch16_224"), 224)
    assert counted == vit(224, 16, 768, 12, 1000)
    assert counted == pytest.approx(35.1e9, rel=1e-3)


def test_a_small_vit(fused: bool) -> None:
    args: dict[str, Any] = {"img_size": 64, "depth": 2, "num_classes": 7}
    on_cpu = timm.create_model("vit_tiny_patch16_224", **args)  # CPU kernels have other names
    for model in (on_cpu.eval(), without_weights("vit_tiny_patch16_224", **args)):
        assert flops_per_image(model, 64) == vit(64, 16, 192, 2, 7)


def test_swin(fused: bool) -> None:
    model = without_weights("swin_tiny_patch4_window7_224")
    assert flops_per_image(model, 224) == swin(224, 96, (2, 2, 6, 2), 7, 1000)
    assert swin(224, 96, (2, 2, 6, 2), 7, 1000) == pytest.approx(2 * 4.5e9, rel=1e-2)  # the paper


def test_convnext() -> None:
    widths, depths = (96, 192, 384, 768), (3, 3, 9, 3)
    assert flops_per_image(without_weights("convnext_tiny"), 224) == convnext(
        224, widths, depths, 1000
    )
    assert convnext(224, widths, depths, 1000) == pytest.approx(2 * 4.5e9, rel=1e-2)  # the paper


def test_resnet() -> None:
    assert flops_per_image(without_weights("resnet50"), 224) == resnet50(224, 1000)
    assert resnet50(224, 1000) == pytest.approx(2 * 4.1e9, rel=1e-2)


def graph_flops(path: Path) -> int:
    """Multiplications and additions of an ONNX graph with static shapes."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(onnx.load(path), data_prop=True).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        shapes[value.name] = [axis.dim_value for axis in value.type.tensor_type.shape.dim]
    total = 0
    for node in graph.node:
        inputs = [shapes.get(name, []) for name in node.input]
        out = math.prod(shapes[node.output[0]])
        if node.op_type in ("MatMul", "Gemm"):
            transposed = any(a.name == "transA" and a.i for a in node.attribute)
            total += 2 * out * inputs[0][0 if transposed else -1]
        elif node.op_type == "Conv":
            total += 2 * out * math.prod(inputs[1][1:])
        else:
            assert node.op_type not in ("Attention", "Einsum", "ConvTranspose"), node.op_type
    return total


@pytest.mark.parametrize(
    ("name", "size", "args"),
    [
        ("vit_tiny_patch16_224", 32, {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 3}),
        (
            "swin_tiny_patch4_window7_224",
            32,
            {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": (2,), "num_heads": (2,)},
        ),
        ("test_convnext", 32, {}),
        ("eva02_tiny_patch14_224", 28, {"img_size": 28, "depth": 1, "embed_dim": 24}),
    ],
)
@pytest.mark.filterwarnings("ignore")  # warnings of torch's exporter
def test_the_count_equals_that_of_the_exported_graph(
    name: str, size: int, args: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    if name.startswith("eva02"):
        args = {**args, "num_heads": 3}
    model = timm.create_model(name, num_classes=5, **args).eval()
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (torch.zeros(1, 3, size, size),), path, dynamo=True, opset_version=20)
    assert flops_per_image(model, size) == graph_flops(path)


def small() -> nn.Module:
    return without_weights("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)


def test_the_count_is_the_same_in_half_precision_and_under_inference_mode() -> None:
    expected = vit(32, 16, 192, 1, 3)
    assert flops_per_image(small().half(), 32) == expected
    with torch.inference_mode():
        assert flops_per_image(small(), 32) == expected


class Tokens(nn.Module):
    """Applies a layer to 16 tokens of width 12."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.patches, self.layer = nn.Conv2d(3, 12, 4, 4), layer

    def forward(self, image: torch.Tensor) -> Any:
        return self.layer(self.patches(image).flatten(2).mT)


def test_encoder_layers_of_pytorch_are_counted_by_their_products() -> None:
    layer = nn.TransformerEncoderLayer(12, 2, dim_feedforward=48, batch_first=True)
    tokens, width = 16, 12
    block = tokens * 12 * width**2 + 2 * tokens**2 * width
    model, fast = Tokens(layer).eval(), torch.backends.mha.get_fastpath_enabled()
    assert flops_per_image(model, 16) == 2 * (16 * 3 * 4 * 4 * width + block)
    assert torch.backends.mha.get_fastpath_enabled() == fast


class Grouped(nn.Module):
    """A transposed convolution, and attention with fewer key heads than query heads."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.ConvTranspose2d(3, 8, 2, 2, groups=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.wide(image).flatten(2).unflatten(1, (4, 2)).mT  # 4 heads of width 2
        return F.scaled_dot_product_attention(x, x[:, :2], x[:, :2], enable_gqa=True)


def test_shared_keys_and_transposed_convolutions_are_counted() -> None:
    tokens = 16 * 16
    convolution = 8 * 8 * 3 * 8 * 2 * 2  # one filter for each input element
    attention = 4 * 2 * tokens * tokens * 2
    assert flops_per_image(Grouped(), 8) == 2 * (convolution + attention)


def test_flops_of_a_model_with_data_dependent_control_flow_are_unknown() -> None:
    class DataDependent(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum() if x.sum().item() > 0 else x

    assert flops_per_image(DataDependent(), 8) is None


def test_flops_of_a_model_with_an_unknown_operator_are_unknown() -> None:
    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            product: torch.Tensor = torch.ops.aoft_tests.fast_product(self.plain(x))
            return product

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.LSTM(8, 4)

        def forward(self, x: torch.Tensor) -> Any:
            return self.rows(x[:, 0])

    @torch.library.custom_op("aoft_tests::fast_product", mutates_args=())
    def fast_product(x: torch.Tensor) -> torch.Tensor:
        return x @ x.mT

    fast_product.register_fake(torch.empty_like)
    assert flops_per_image(Foreign(), 8) is None
    counted = flops_per_image(Recurrent(), 8)  # 8 steps of 4 gates, or None if it is one operator
    assert counted in (None, 2 * 8 * 16 * (8 + 4))


def test_flops_of_a_model_without_products_are_unknown() -> None:
    assert flops_per_image(nn.ReLU(), 8) is None
