"""Triton folders: a configuration that NVIDIA's schema accepts, and a model with right logits."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image
from specs import export_spec
from torch import nn

from aoft_deploy.artefacts.prediction import load_classifier
from aoft_deploy.artefacts.registry import load_artefact
from aoft_deploy.cli.export import main
from aoft_deploy.cli.inspect import describe
from aoft_deploy.cli.predict import main as predict
from aoft_deploy.errors import CheckpointError, SettingError
from aoft_deploy.tuning.merging import merge
from aoft_deploy.tuning.tuned_model import TunedModel
from aoft_exporters.tensorrt.library import find_gpu, library
from aoft_exporters.triton import onnx_exporter as exporter
from aoft_exporters.triton import tensorrt_exporter
from aoft_exporters.triton.config import CONFIG, LABELS, TASKS, write_config

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def texts(*options: object) -> list[str]:
    return [str(option) for option in options]


def parsed(folder: Path) -> Any:
    """The configuration parsed with NVIDIA's schema, which checks field names and types."""
    definition: Any = importlib.import_module("tritonclient.grpc.model_config_pb2")
    text_format: Any = importlib.import_module("google.protobuf.text_format")
    text = (folder / CONFIG).read_text("utf-8")
    return text_format.Parse(text, definition.ModelConfig())


def kind(number: int) -> str:
    definition: Any = importlib.import_module("tritonclient.grpc.model_config_pb2")
    return str(definition.DataType.Name(number))


@pytest.fixture(scope="module")
def repository(checkpoint: Path, backbone_weights: Path, tmp_path_factory: Any) -> Path:
    """One task with normalised input (``floats``) and with uint8 input (``pixels``)."""
    path: Path = tmp_path_factory.mktemp("models")
    options = texts("--merge", checkpoint, "--backbone-weights", backbone_weights, "--to", "triton")
    assert main([*options, "-o", str(path / "floats")]) == 0
    assert main([*options, "-o", str(path / "pixels"), "--uint8", "--batches", "1", "4", "6"]) == 0
    return path


@pytest.fixture(scope="module")
def fleet(
    make_checkpoint: Callable[..., Path], backbone_weights: Path, tmp_path_factory: Any
) -> Path:
    """Two tasks of RLRR, whose default form for other exporters is folded."""
    folder: Path = tmp_path_factory.mktemp("fleet")
    for name in ("cats", "犬"):
        (folder / f"{name}.ckpt").write_bytes(make_checkpoint("rlrr").read_bytes())
    options = ["--fleet", *sorted(folder.iterdir()), "--backbone-weights", backbone_weights]
    assert main(texts(*options, "--to", "triton", "-o", folder / "models" / "fleet")) == 0
    return folder / "models" / "fleet"


def test_the_folder_has_tritons_layout(repository: Path, classes: tuple[str, ...]) -> None:
    folder = repository / "floats"
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert files == [exporter.MARKER, CONFIG, LABELS]
    assert (folder / LABELS).read_text("utf-8") == "".join(f"{name}\n" for name in classes)
    config = parsed(folder)
    assert (config.name, config.backend, config.max_batch_size) == ("", "onnxruntime", 32)
    assert config.HasField("dynamic_batching")
    assert config.output[0].label_filename == LABELS
    assert not config.input[0].HasField("reshape")
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    assert json.loads(parameters["preprocessing"])["size"] == 16
    assert (parameters["precision"], parameters["method"]) == ("fp32", "rlrr")


@pytest.mark.parametrize("name", ["floats", "pixels", "fleet"])
def test_the_configuration_describes_the_graphs_inputs_and_outputs_without_the_batch(
    name: str, repository: Path, fleet: Path
) -> None:
    folder = fleet if name == "fleet" else repository / name
    graph, config = onnx.load(folder / exporter.MARKER).graph, parsed(folder)
    onnx_kinds = {"TYPE_FP32": 1, "TYPE_UINT8": 2, "TYPE_INT64": 7}
    for stated, values in ((config.input, graph.input), (config.output, graph.output)):
        assert [s.name for s in stated] == [v.name for v in values]
        for tensor, value in zip(stated, values, strict=True):
            assert onnx_kinds[kind(tensor.data_type)] == value.type.tensor_type.elem_type
            axes = value.type.tensor_type.shape.dim
            assert axes[0].dim_param == "batch"
            shape = tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims
            assert len(shape) == len(axes) - 1
            for side, axis in zip(shape, axes[1:], strict=True):
                assert axis.dim_value in (0, side)


def test_the_warm_up_covers_every_input_and_batch_size(repository: Path, fleet: Path) -> None:
    for folder, sizes in ((repository / "pixels", [1, 4, 6]), (fleet, [1, 8, 32])):
        config = parsed(folder)
        assert config.max_batch_size == sizes[-1]
        assert [warm.batch_size for warm in config.model_warmup] == sizes
        for warm in config.model_warmup:
            assert set(warm.inputs) == {tensor.name for tensor in config.input}
            for tensor in config.input:
                assert warm.inputs[tensor.name].data_type == tensor.data_type
                assert list(warm.inputs[tensor.name].dims) == list(tensor.dims)
                assert warm.inputs[tensor.name].zero_data


def test_the_model_agrees_with_the_onnx_artefact(
    repository: Path, artefact: Path, photos: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = [Image.open(photo).convert("RGB") for photo in photos]
    exact = load_classifier(artefact).scores(pictures)
    for name in ("floats", "pixels"):
        found = load_classifier(repository / name).scores(pictures)
        np.testing.assert_allclose(found, exact, atol=2e-5, rtol=0)
    capsys.readouterr()
    assert predict([str(repository / "floats"), str(photos[0])]) == 0
    assert capsys.readouterr().out
    manifest = json.loads((repository / "floats.json").read_text("utf-8"))
    assert manifest["exporter"] == "triton"
    assert manifest["verification"]["max_abs"] < 5e-5


def test_aoft_inspect_describes_a_triton_model(repository: Path, tmp_path: Path) -> None:
    found = describe(repository / "floats")
    assert (found["kind"], found["precision"], found["manifest"]) == (
        "Triton artefact",
        "fp32",
        "matches",
    )
    assert found["inputs"] == ["pixel_values float [batch, 3, 16, 16]"]
    (tmp_path / CONFIG).touch()
    with pytest.raises(CheckpointError, match="is a Triton model: give what aoft-train or"):
        describe(tmp_path)


def test_a_fleet_takes_a_task_for_each_sample_of_a_batch(fleet: Path) -> None:
    config = parsed(fleet)
    task = {tensor.name: tensor for tensor in config.input}["task"]
    assert list(task.dims) == [1]
    assert task.HasField("reshape")
    assert list(task.reshape.shape) == []
    assert config.output[0].label_filename == ""
    tasks = json.loads((fleet / TASKS).read_text("utf-8"))
    assert [task["name"] for task in tasks] == ["cats", "犬"]
    assert "日本" in tasks[1]["classes"]
    assert json.loads(fleet.with_name("fleet.json").read_text("utf-8"))["form"] == "mixed"
    engine: Any = load_artefact(fleet)
    images = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
    both = engine.run(images, np.array([0, 1]))
    np.testing.assert_allclose(both[1], engine.run(images[1:], np.array([1]))[0], atol=1e-5)


def test_the_same_input_gives_the_same_configuration(
    make_tuned: Callable[..., TunedModel], tmp_path: Path
) -> None:
    merged: nn.Module = merge(make_tuned("rlrr"))
    spec = export_spec(16, False, MEAN, STD, {"classes": '["a", "b"]'})
    for name in "xy":
        exporter.export(merged, tmp_path / name, spec)
    assert (tmp_path / "x" / CONFIG).read_bytes() == (tmp_path / "y" / CONFIG).read_bytes()
    exporter.export(merged, tmp_path / "z", export_spec(16, False, MEAN, STD, {}))
    assert list(parsed(tmp_path / "z").output[0].dims) == [-1]
    assert not (tmp_path / "z" / LABELS).exists()


def test_special_characters_are_escaped(tmp_path: Path) -> None:
    special = "a\"b\\c\nd\re 日本 ' {}"
    spec = export_spec(16, False, MEAN, STD, {"method": special})
    write_config(tmp_path, spec, "tensorrt")
    config = parsed(tmp_path)
    assert config.parameters["method"].string_value == special
    assert (config.backend, list(config.dynamic_batching.preferred_batch_size)) == ("tensorrt", [8])


@pytest.mark.parametrize("module", [exporter, tensorrt_exporter])
def test_a_class_with_a_line_break_is_refused(module: Any, tmp_path: Path) -> None:
    spec = export_spec(16, False, MEAN, STD, {"classes": json.dumps(["cat", "a\nb"])})
    with pytest.raises(SettingError, match=r"The class 'a\\nb' has a line break, but Triton's"):
        module.export(nn.Identity(), tmp_path / "a", spec)
    assert not list(tmp_path.iterdir())


def test_options_that_triton_does_not_support_are_refused(
    checkpoint: Path, backbone_weights: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    options = ["--backbone-weights", backbone_weights, "-o", tmp_path / "a"]
    line = refused(main, "--fleet", checkpoint, *options, "--to", "triton", "--form", "folded")
    assert "does not support fleets of the form folded" in line
    line = refused(main, "--merge", checkpoint, *options, "--to", "triton", "--batches", 3, 2, 1)
    assert "--batches is 3 2 1, but must be the smallest, usual and largest batch" in line
    if find_gpu() is None or library().name == "tensorrt-rtx":
        plan = ["--merge", checkpoint, *options, "--to", "triton-tensorrt"]
        line = refused(main, *plan, "--compute-capability", "8.9")
        assert "Triton does not run plans of tensorrt-rtx: install tensorrt" in line
