"""Refitting: weights have timm's names, and the rest of the graph must be equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from specs import export_spec, with_build
from tensorrt_target import GPU, on_gpu

from aoft_deploy.errors import ArtefactError, OutputError, SettingError
from aoft_deploy.tuning.merging import merge
from aoft_deploy.tuning.tuned_model import TunedModel
from aoft_exporters.graph.low_precision import typed
from aoft_exporters.onnx import exporter as onnx_exporter
from aoft_exporters.tensorrt import exporter
from aoft_exporters.tensorrt.library import Library, library
from aoft_exporters.tensorrt.metadata import METADATA, Metadata
from aoft_exporters.tensorrt.refit import mark, named_weights, refitted, structure

HALF = (0.5, 0.5, 0.5)
SPEC = export_spec(16, False, HALF, HALF, {}, opset=20)
REFITTED = [p for p in exporter.EXPORTER.precisions if p not in exporter.EXPORTER.calibrated]


@pytest.fixture(scope="module")
def graphs(make_tuned: Callable[..., TunedModel], tmp_path_factory: Any) -> list[Any]:
    """Two tasks of one backbone."""
    path = tmp_path_factory.mktemp("refit") / "a.onnx"
    found = []
    for seed in (2, 3):
        onnx_exporter.export(merge(make_tuned("rlrr", seed=seed)), path, SPEC)
        found.append(onnx.load(path))
    return found


@pytest.fixture(scope="module")
def names(make_tuned: Callable[..., TunedModel]) -> set[str]:
    return set(merge(make_tuned("rlrr")).state_dict())


@pytest.mark.parametrize("precision", REFITTED)
def test_every_weight_can_be_marked_by_its_timm_name(
    precision: str, graphs: list[Any], names: set[str]
) -> None:
    graph = graphs[0] if precision in ("fp32", "tf32") else typed(graphs[0], precision)
    chosen = library()
    trt = chosen.module
    builder = trt.Builder(chosen.log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, chosen.log)
    assert parser.parse(graph.SerializeToString())
    weights = named_weights(graph, names)
    assert set(weights) == names
    config = builder.create_builder_config()
    mark(chosen, network, config, weights)
    assert config.get_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
    assert all(network.are_weights_marked_refittable(name) for name in names)
    with pytest.raises(OutputError, match="does not know the weight nonsense"):
        mark(chosen, network, config, ["nonsense"])


def test_tasks_of_one_backbone_share_a_structure_and_other_graphs_do_not(
    graphs: list[Any], names: set[str]
) -> None:
    hashes = [structure(graph, named_weights(graph, names)) for graph in graphs]
    assert hashes[0] == hashes[1]
    weights = named_weights(graphs[0], names)
    fewer = {name: tensor for name, tensor in weights.items() if name != "pos_embed"}
    assert structure(graphs[0], fewer) != hashes[0]
    assert structure(typed(graphs[0], "fp16"), weights) != hashes[0]
    changed = onnx.ModelProto.FromString(graphs[0].SerializeToString())
    head = next(i for i in changed.graph.initializer if i.name == "head.bias")
    head.CopyFrom(onnx.numpy_helper.from_array(np.zeros(4, np.float32), "head.bias"))
    assert structure(changed, weights) != hashes[0]
    changed = onnx.ModelProto.FromString(graphs[0].SerializeToString())
    constant = next(i for i in changed.graph.initializer if i.name not in names)
    values = onnx.numpy_helper.to_array(constant) + 1
    constant.CopyFrom(onnx.numpy_helper.from_array(values, constant.name))
    assert structure(changed, weights) != hashes[0]


@pytest.mark.skipif(GPU is not None, reason="needs a machine without a GPU")
@pytest.mark.parametrize("build", [{"refittable": True}, {"refit": Path("old")}])
def test_without_a_gpu_refitting_is_refused(
    build: dict[str, Any], make_tuned: Callable[..., TunedModel], tmp_path: Path
) -> None:
    spec = with_build(SPEC, compute_capability="8.9", **build)
    with pytest.raises(SettingError, match="leave `refit` and `refittable` out"):
        exporter.export(merge(make_tuned("rlrr")), tmp_path / "a", spec)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failing", ["set_named_weights", "refit", "set_flag", "serialize"])
def test_a_step_of_refitting_that_tensorrt_refuses_is_an_error(failing: str) -> None:
    class Refitter:
        def __init__(self, engine: Any, log: Any) -> None:
            pass

        def get_all_weights(self) -> list[str]:
            return ["a"]

        def get_missing_weights(self) -> list[str]:
            return []

        def set_named_weights(self, name: str, weights: Any) -> bool:
            return failing != "set_named_weights"

        def refit_cuda_engine(self) -> bool:
            return failing != "refit"

    options = SimpleNamespace(set_flag=lambda flag: failing != "set_flag")
    engine = SimpleNamespace(
        create_serialization_config=lambda: options,
        serialize_with_config=lambda options: None if failing == "serialize" else b"plan",
    )
    real = library("tensorrt-rtx")
    module = SimpleNamespace(
        Runtime=lambda log: SimpleNamespace(deserialize_cuda_engine=lambda plan: engine),
        Refitter=Refitter,
        Weights=lambda kind, address, size: None,
        SerializationFlag=SimpleNamespace(INCLUDE_REFIT=0),
        float32=0,
        float16=1,
        bfloat16=2,
    )
    weights = {"a": onnx.numpy_helper.from_array(np.zeros(3, np.float32), "a")}
    with pytest.raises(OutputError, match="TensorRT cannot refit the engine"):
        refitted(b"plan", Library(module, "tensorrt", "1", real.log), weights)


class TestOnDevice:
    """Tests that need a GPU."""

    pytestmark = on_gpu

    @pytest.mark.parametrize("precision", REFITTED)
    def test_a_refitted_engine_gives_the_new_tasks_logits(
        self, precision: str, make_tuned: Callable[..., TunedModel], tmp_path: Path
    ) -> None:
        spec = replace(with_build(SPEC, refittable=True), precision=precision)
        exporter.export(merge(make_tuned("rlrr", seed=2)), tmp_path / "old", spec)
        tuned = make_tuned("rlrr", seed=3)
        again = with_build(spec, refit=tmp_path / "old")
        exporter.export(merge(tuned), tmp_path / "new", again)
        assert Metadata.read(tmp_path / "new" / METADATA).origin == "refitted"
        x = np.random.default_rng(0).normal(size=(5, 3, 16, 16)).astype(np.float32)
        with torch.inference_mode():
            expected = tuned(torch.from_numpy(x)).numpy()
        found = exporter.load(tmp_path / "new").run(x)
        atol = 1e-4 if precision == "fp32" else 0.05 * np.ptp(expected)
        np.testing.assert_allclose(found, expected, atol=atol, rtol=0)

    def test_an_engine_without_refittable_weights_is_rebuilt(
        self, make_tuned: Callable[..., TunedModel], tmp_path: Path
    ) -> None:
        exporter.export(merge(make_tuned("rlrr", seed=2)), tmp_path / "old", SPEC)
        again = with_build(SPEC, refit=tmp_path / "old")
        exporter.export(merge(make_tuned("rlrr", seed=3)), tmp_path / "new", again)
        assert Metadata.read(tmp_path / "new" / METADATA).origin == "built"

    def test_a_folder_without_a_plan_is_refused(
        self, make_tuned: Callable[..., TunedModel], tmp_path: Path
    ) -> None:
        with pytest.raises(ArtefactError, match=r"There is no folder .* to refit"):
            exporter.export(
                merge(make_tuned("rlrr")), tmp_path / "a", with_build(SPEC, refit=tmp_path)
            )
