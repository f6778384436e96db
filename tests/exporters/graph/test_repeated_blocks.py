"""One of several alike blocks is traced; the graph is that of a trace of the whole model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from aoft_deploy.tuning.attaching import attach
from aoft_deploy.tuning.backbones.identity import identify
from aoft_deploy.tuning.multitask import FoldedModel, MixedModel
from aoft_exporters.graph import cache
from aoft_exporters.graph.alike_modules import alike_modules
from aoft_exporters.graph.cache import graph_of
from aoft_exporters.graph.fleet_tables import FLEET_TABLES

Examples = dict[str, tuple[Tensor, str]]


def varied(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, with different values in all parameters."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def vit(**changes: Any) -> Any:
    name: Any = "vit_tiny_patch16_224"
    args: dict[str, Any] = dict(img_size=32, depth=3, embed_dim=48, num_heads=3, num_classes=4)
    return varied(timm.create_model(name, **args, **changes))


def images(side: int = 32) -> Examples:
    return {"pixel_values": (torch.zeros(2, 3, side, side), "batch")}


def merged() -> tuple[nn.Module, Examples]:
    return vit(), images()


def fleet(method: str, form: Any) -> tuple[nn.Module, Examples]:
    model = vit()
    identity = identify(model, name="vit_tiny_patch16_224", origin="timm", args={})
    fleets = form(attach(model, method, backbone=identity))
    examples = {**images(), "task": (torch.zeros(2, dtype=torch.int64), "batch")}
    tables = {
        "bank": torch.zeros(4, fleets.layout.row_length),
        "heads": torch.zeros(5, fleets.width + 1),
        "first": torch.zeros(6, dtype=torch.int64),
        "count": torch.zeros(7, dtype=torch.int64),
        "columns": torch.zeros(8, dtype=torch.int64),
    }
    return fleets, examples | {name: (t, FLEET_TABLES[name]) for name, t in tables.items()}


def inputs(examples: Examples) -> dict[str, np.ndarray]:
    """Three images, of tasks 1, 1 and 1 among two with four classes each."""
    generator = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {
        "pixel_values": generator.normal(size=(3, *examples["pixel_values"][0].shape[1:]))
    }
    if "task" in examples:
        found["bank"] = 0.1 * generator.normal(size=(2, examples["bank"][0].shape[1]))
        found["heads"] = generator.normal(size=(8, examples["heads"][0].shape[1]))
        found |= {"task": np.array([1, 1, 1]), "first": np.array([0, 4])}
        found |= {"count": np.array([4, 4]), "columns": np.arange(4)}
    floats = {name: value.astype(np.float32) for name, value in found.items() if value.ndim > 1}
    return {name: floats.get(name, found[name]) for name in examples}


def computed(proto: Any, given: dict[str, np.ndarray]) -> np.ndarray:
    import onnxruntime

    ort: Any = onnxruntime
    session = ort.InferenceSession(proto.SerializeToString())
    result: np.ndarray = session.run(None, given)[0]
    return result


@pytest.mark.parametrize(
    "make",
    [
        merged,
        lambda: fleet("aoft-lora-star", MixedModel),
        lambda: fleet("lora", FoldedModel),
    ],
    ids=["merged", "aoft mixed", "lora folded"],
)
def test_the_graph_is_node_for_node_that_of_the_whole_trace(
    make: Callable[[], tuple[nn.Module, Examples]],
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, examples = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    blocks = set[int]()
    block: Any = timm.models.vision_transformer.Block
    forward = block.forward

    def counted(self: Any, x: Tensor) -> Any:
        blocks.add(id(self))
        return forward(self, x)

    monkeypatch.setattr(block, "forward", counted)
    graphs = []
    for folder in ("one", "all"):
        monkeypatch.setenv("AOFT_CACHE_DIR", str(tmp_path / folder))
        blocks.clear()
        graphs.append(graph_of(model, examples, {"name": "vit"}))
        assert len(blocks) == {"one": 1, "all": 3}[folder]
        monkeypatch.setattr(cache, "alike_modules", lambda model: {})
    one, whole = graphs
    operators = [Counter(node.op_type for node in each.graph.node) for each in graphs]
    assert operators[0] == operators[1]
    onnx.checker.check_model(one)
    assert len(one.graph.initializer) == len(whole.graph.initializer)
    assert len(one.graph.value_info) == len(whole.graph.value_info)
    weights = [{t.name for t in each.graph.initializer if "weight" in t.name} for each in graphs]
    assert weights[0] == weights[1]
    given = inputs(examples)
    np.testing.assert_array_equal(computed(one, given), computed(whole, given))
    with torch.no_grad():
        expected = model(*map(torch.from_numpy, given.values())).numpy()
    np.testing.assert_allclose(computed(one, given), expected, atol=1e-4)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


class Block(nn.Module):
    """A block with what a block of a model can have: weights, buffers, constants and texts."""

    def __init__(self, factor: float = 2.0, table: float = 1.0, name: str = "") -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.factor, self.name = factor, name
        self.register_buffer("table", torch.tensor([table]), persistent=False)
        self.register_buffer("mean", torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        mean, table = self.get_buffer("mean"), self.get_buffer("table")
        result: Tensor = x + self.factor * self.linear(x - mean) * table
        return result


class Stack(nn.Module):
    """A model that calls its blocks one after the other, or in another way."""

    def __init__(self, *blocks: nn.Module, way: str = "") -> None:
        super().__init__()
        self.blocks, self.way = nn.Sequential(*blocks), way

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = pixel_values.mean((2, 3)).repeat(1, 2)
        for i, block in enumerate(self.blocks):
            if self.way == "longer" and i == 1:
                x = x[:, None].expand(-1, 2, -1)
            x = block(x)
        if self.way == "twice":
            x = self.blocks[0](x)
        return x.mean(1) if x.dim() == 3 else x


class Growing(Block):
    """A block that changes the shape of its input."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x[..., :6])
        return torch.cat([x, y], dim=-1)


def kinds(*blocks: nn.Module) -> list[int]:
    """For each block, the index of the first like it, or −1 if there is none."""
    found = alike_modules(Stack(*blocks))
    firsts = (found.get(f"blocks.{i}", "-1") for i in range(len(blocks)))
    return [int(first.rpartition(".")[2]) for first in firsts]


def test_blocks_are_alike_if_they_differ_in_their_weights_alone() -> None:
    assert kinds(Block(), Block(), Block()) == [0, 0, 0]
    assert kinds(Block(), Block(factor=3.0), Block(), Block(factor=3.0)) == [0, 1, 0, 1]
    assert kinds(Block(), Block(table=3.0), Block()) == [0, -1, 0]  # not saved: part of the code
    assert kinds(Block(), Growing()) == [-1, -1]
    assert kinds(Block(name="blocks.0.x"), Block(name="blocks.1.x")) == [0, 0]  # names of sites
    assert kinds(Block(name="blocks.0.x"), Block(name="blocks.1.y")) == [-1, -1]
    tied = Block()
    tied.linear.weight = (first := Block()).linear.weight
    assert kinds(first, tied, Block(), Block()) == [-1, -1, 2, 2]
    wider = Block()
    wider.linear = nn.Linear(6, 6, bias=False)
    assert kinds(Block(), wider) == [-1, -1]


@pytest.mark.parametrize("way", ["", "longer", "twice", "growing"])
def test_blocks_that_are_called_in_different_ways_are_all_traced(
    way: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AOFT_CACHE_DIR", str(tmp_path))
    kind = Growing if way == "growing" else Block
    model = varied(Stack(kind(), kind(), kind(), way=way))
    traced: list[int] = []
    trace: Any = vars(cache)["trace"]

    def counted(*arguments: Any) -> Any:
        traced.append(len(arguments))
        return trace(*arguments)

    monkeypatch.setattr(cache, "trace", counted)
    given = inputs(images(8))
    logits = computed(graph_of(model, images(8), {"name": way}), given)
    assert traced == ([3] if way == "" else [3, 2])
    with torch.no_grad():
        expected = model(torch.from_numpy(given["pixel_values"])).numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_a_trace_keeps_none_of_the_models_weights(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch and onnxscript keep what they traced last."""
    monkeypatch.setenv("AOFT_CACHE_DIR", str(tmp_path))
    model, examples = merged()
    weak: Any = StorageWeakRef
    storages = [weak(each.untyped_storage()) for each in model.parameters()]
    graph_of(model, examples, {"name": "vit"})
    assert not any(storage.expired() for storage in storages)
    del model
    assert all(storage.expired() for storage in storages)
