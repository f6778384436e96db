from __future__ import annotations

import importlib
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from specs import export_spec, with_build
from torch import nn

from aoft_deploy.artefacts.engine import EngineOptions, FleetTables
from aoft_deploy.artefacts.spec import Calibration
from aoft_deploy.artefacts.verification import random_pixels
from aoft_deploy.errors import ArtefactError, AttachError, OutputError
from aoft_deploy.tuning.attaching import attach
from aoft_deploy.tuning.backbones.identity import identify
from aoft_deploy.tuning.merging import merge
from aoft_deploy.tuning.multitask import MixedModel
from aoft_deploy.tuning.tuned_model import TunedModel
from aoft_exporters.onnx import exporter

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SPEC = export_spec(16, False, MEAN, STD, {"classes": '["日本"]', "empty": ""})


def inputs(batch: int, size: int = 16) -> NDArray[np.float32]:
    generator = np.random.default_rng(batch)
    return generator.normal(0, 1, (batch, 3, size, size)).astype(np.float32)


def pixels(batch: int, size: int = 16) -> NDArray[np.uint8]:
    return np.random.default_rng(batch).integers(0, 256, (batch, size, size, 3), np.uint8)


def normalised(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Reference in float64, rounded once."""
    scaled = (image / 255 - np.array(MEAN)) / np.array(STD)
    result: NDArray[np.float32] = scaled.transpose(0, 3, 1, 2).astype(np.float32)
    return result


def logits_of(model: nn.Module, x: NDArray[np.float32]) -> NDArray[np.float32]:
    with torch.inference_mode():
        logits: NDArray[np.float32] = model(torch.from_numpy(x)).numpy()
    return logits


def run(path: Path, x: NDArray[Any]) -> NDArray[np.float32]:
    runtime: Any = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (value,) = session.get_inputs()
    logits: Any = session.run(None, {value.name: x})[0]
    assert logits.dtype == np.float32
    return np.asarray(logits)


@pytest.fixture(scope="module")
def merged(make_tuned: Callable[..., TunedModel]) -> nn.Module:
    return merge(make_tuned("rlrr"))


@pytest.fixture(scope="module")
def graph(artefact: Path) -> Any:
    return onnx.load(artefact)


def test_the_artefact_gives_the_unmerged_logits_at_every_batch_size(
    artefact: Path, make_tuned: Callable[..., TunedModel]
) -> None:
    tuned = make_tuned("rlrr")
    for batch in (1, 2, 3, 7, 33):
        x = inputs(batch)
        expected = logits_of(tuned, x)
        assert np.ptp(expected) > 0.5
        np.testing.assert_allclose(run(artefact, x), expected, atol=5e-5, rtol=0)


def test_logits_of_an_image_do_not_depend_on_its_batch(artefact: Path) -> None:
    x = inputs(7)
    alone = np.concatenate([run(artefact, x[i : i + 1]) for i in range(7)])
    np.testing.assert_allclose(run(artefact, x), alone, atol=1e-5, rtol=0)


def test_initialisers_keep_timms_names_and_the_folded_values(graph: Any, merged: nn.Module) -> None:
    initialisers = {i.name: numpy_helper.to_array(i) for i in graph.graph.initializer}
    for name, tensor in merged.state_dict().items():
        in_matmul = name.startswith("blocks") and tensor.dim() == 2
        expected = (tensor.T if in_matmul else tensor).numpy()
        assert name in initialisers
        np.testing.assert_array_equal(initialisers[name], expected, err_msg=name)


def test_no_path_of_the_exporting_machine_is_in_the_file(artefact: Path) -> None:
    content = artefact.read_bytes()
    assert os.fsencode(Path(timm.__file__).parent) not in content
    assert b"stack_trace" not in content


def test_weights_are_stored_once(graph: Any, artefact: Path, merged: nn.Module) -> None:
    parameters = sum(tensor.numel() for tensor in merged.state_dict().values())
    stored = sum(int(np.prod(i.dims)) for i in graph.graph.initializer)
    assert parameters <= stored < parameters + 100
    assert artefact.stat().st_size < 4 * parameters + 60_000


def test_the_artefact_is_one_valid_file_of_opset_23(graph: Any, artefact: Path) -> None:
    onnx.checker.check_model(graph, full_check=True)
    assert not any(i.data_location == TensorProto.EXTERNAL for i in graph.graph.initializer)
    assert sorted(os.listdir(artefact.parent)) == [artefact.name, artefact.name + ".json"]
    assert {entry.domain: entry.version for entry in graph.opset_import}[""] == 23
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"}


def test_the_file_can_be_moved_without_its_manifest(artefact: Path, tmp_path: Path) -> None:
    (tmp_path / "moved.onnx").write_bytes(artefact.read_bytes())
    np.testing.assert_array_equal(run(tmp_path / "moved.onnx", inputs(2)), run(artefact, inputs(2)))


def shape_of(value: Any) -> list[str | int]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def test_input_and_output_have_the_documented_names_types_and_shapes(graph: Any) -> None:
    (source,), (result,) = graph.graph.input, graph.graph.output
    assert (source.name, result.name) == ("pixel_values", "logits")
    assert (
        source.type.tensor_type.elem_type == result.type.tensor_type.elem_type == TensorProto.FLOAT
    )
    assert shape_of(source) == ["batch", 3, 16, 16]
    assert shape_of(result) == ["batch", 5]


def test_with_uint8_the_input_is_an_image(pixel_artefact: Path) -> None:
    graph = onnx.load(pixel_artefact).graph
    (source,), (result,) = graph.input, graph.output
    assert (source.name, result.name) == ("image", "logits")
    assert source.type.tensor_type.elem_type == TensorProto.UINT8
    assert shape_of(source) == ["batch", 16, 16, 3]
    assert shape_of(result) == ["batch", 5]


def randomised(model: nn.Module) -> nn.Module:
    """The model with noise, so that no two tensors are equal, as in a trained model."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def operators(proto: Any) -> Counter[str]:
    return Counter(node.op_type for node in proto.graph.node)


def test_the_merge_adds_no_operator_to_the_plain_backbone(
    graph: Any, backbone_name: str, backbone_args: dict[str, Any], tmp_path: Path
) -> None:
    plain = timm.create_model(backbone_name, num_classes=5, **backbone_args)
    exporter.export(randomised(plain), tmp_path / "plain.onnx", SPEC)
    other = onnx.load(tmp_path / "plain.onnx")
    assert operators(graph) == operators(other)
    assert len(graph.graph.node) == len(other.graph.node)
    shapes = {i.name: tuple(i.dims) for i in other.graph.initializer}
    assert {i.name: tuple(i.dims) for i in graph.graph.initializer} == shapes


def test_pixels_cost_two_operators_on_the_input(graph: Any, pixel_artefact: Path) -> None:
    additional = operators(onnx.load(pixel_artefact))
    additional.subtract(operators(graph))
    assert {name: count for name, count in additional.items() if count} == {
        "Cast": 1,
        "Transpose": 1,
    }


def test_the_metadata_describe_the_exported_task(graph: Any, classes: tuple[str, ...]) -> None:
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    assert metadata["format"] == "aoft-deploy/1"
    assert json.loads(metadata["classes"]) == list(classes)
    assert json.loads(metadata["preprocessing"])["mean"] == list(MEAN)
    assert len(json.loads(metadata["backbone"])["digest"]) == 64
    assert metadata["method"] == "rlrr"
    assert "日本" in metadata["classes"]


def test_value_info_holds_no_initialisers(graph: Any) -> None:
    # onnxruntime#25890: the quantiser would use the shape of the weight before transposing.
    names = {i.name for i in graph.graph.initializer}
    assert not names & {info.name for info in graph.graph.value_info}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_onnx_runtimes_dynamic_quantiser_runs_on_the_artefact_of_opset_20(
    merged: nn.Module, artefact: Path, tmp_path: Path
) -> None:
    # In opset 23, the quantiser confuses ONNX's operator Attention with its own.
    quantization: Any = importlib.import_module("onnxruntime.quantization")
    older, int8 = tmp_path / "older.onnx", tmp_path / "int8.onnx"
    exporter.export(merged, older, with_build(SPEC, opset=20))
    quantization.quantize_dynamic(older, int8)
    found = operators(onnx.load(int8))
    assert found["MatMulInteger"] + found["DynamicQuantizeMatMul"] > 0
    exact, quantised = run(artefact, inputs(7)), run(int8, inputs(7))
    assert np.abs(quantised - exact).max() < 0.2 * np.abs(exact).max()


def test_the_pixel_graph_agrees_with_the_float_graph_on_the_same_images(
    artefact: Path, pixel_artefact: Path
) -> None:
    for batch in (1, 7):
        image = pixels(batch)
        expected = run(artefact, normalised(image))
        np.testing.assert_allclose(run(pixel_artefact, image), expected, atol=5e-5, rtol=0)


def test_the_pixel_graph_agrees_on_black_and_white(artefact: Path, pixel_artefact: Path) -> None:
    for value in (0, 1, 254, 255):
        image = np.full((1, 16, 16, 3), value, np.uint8)
        expected = run(artefact, normalised(image))
        np.testing.assert_allclose(run(pixel_artefact, image), expected, atol=5e-5, rtol=0)


def test_pixels_work_on_a_patch_embedding_without_bias(tmp_path: Path) -> None:
    size: dict[str, Any] = {"img_size": 32, "depth": 1, "embed_dim": 32, "num_heads": 2}
    model = timm.create_model("vit_xsmall_patch16_clip_224", num_classes=4, **size)
    model = randomised(model)
    assert "patch_embed.proj.bias" not in model.state_dict()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exporter.export(model, tmp_path / "clip.onnx", export_spec(32, True, MEAN, STD, {}))
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    image = pixels(3, 32)
    expected = logits_of(model, normalised(image))
    np.testing.assert_allclose(run(tmp_path / "clip.onnx", image), expected, atol=5e-5, rtol=0)
    names = {i.name for i in onnx.load(tmp_path / "clip.onnx").graph.initializer}
    assert set(before) <= names


@pytest.mark.parametrize("name", ["resnet10t", "test_convnext"])
def test_pixels_are_refused_by_a_model_without_a_plain_patch_embedding(
    name: str, tmp_path: Path
) -> None:
    model = timm.create_model(name, num_classes=4)
    tuned = attach(model, "linear", backbone=identify(model))
    with pytest.raises(AttachError, match="folds normalisation into an unpadded patch embedding"):
        exporter.export(merge(tuned), tmp_path / "a.onnx", export_spec(32, True, MEAN, STD, {}))
    assert os.listdir(tmp_path) == []


def test_pixels_are_refused_by_a_padded_patch_embedding(tmp_path: Path) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embed = nn.Module()
            self.patch_embed.proj = nn.Conv2d(3, 8, 8, 8, padding=1)

    with pytest.raises(AttachError, match="which Padded does not have: leave it out"):
        exporter.export(Padded(), tmp_path / "a.onnx", export_spec(32, True, MEAN, STD, {}))


@pytest.mark.parametrize(
    ("precision", "size"),
    [("fp32", "16"), ("tf32", "16"), ("fp16", "8"), ("bf16", "8"), ("fp8", "4"), ("int8", "4")],
)
def test_models_too_large_for_one_file_are_refused_before_tracing(
    precision: str, size: str, tmp_path: Path
) -> None:
    with torch.device("meta"):
        model = nn.Linear(2**16, 2**16)
    with pytest.raises(OutputError, match=rf"{size}\.0 GiB in {precision}, but one ONNX file"):
        exporter.export(model, tmp_path / "a.onnx", replace(SPEC, precision=precision))


@pytest.mark.parametrize("precision", exporter.EXPORTER.precisions)
def test_the_size_limit_counts_the_stored_bytes_of_the_precision_exactly(
    precision: str, merged: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = SPEC.input.height
    images = Calibration(random_pixels(2, size)) if precision == "fp8" else None
    spec = replace(SPEC, precision=precision, calibration=images, metadata={})
    exporter.export(merged, tmp_path / "a.onnx", spec)
    tensors = [numpy_helper.to_array(t) for t in onnx.load(tmp_path / "a.onnx").graph.initializer]
    size = sum(tensor.nbytes for tensor in tensors)
    monkeypatch.setattr(exporter, "SINGLE_FILE_LIMIT", size)
    exporter.export(merged, tmp_path / "b.onnx", spec)
    assert size < (tmp_path / "b.onnx").stat().st_size < 4 * size
    monkeypatch.setattr(exporter, "SINGLE_FILE_LIMIT", size - 1)
    lower = "" if precision in ("fp8", "int8") else "choose a lower `precision`, or "
    sentence = (
        f"GiB in {precision}, but one ONNX file holds 2 GiB: {lower}export to openvino or timm"
    )
    with pytest.raises(OutputError, match=sentence):
        exporter.export(merged, tmp_path / "c.onnx", spec)
    assert not (tmp_path / "c.onnx").exists()


def test_a_model_too_large_in_float32_fits_in_fp16_and_int8(
    merged: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(4 * tensor.numel() for tensor in merged.state_dict().values())
    monkeypatch.setattr(exporter, "SINGLE_FILE_LIMIT", 0.7 * size)
    with pytest.raises(
        OutputError, match="choose a lower `precision`, or export to openvino or timm with"
    ):
        exporter.export(merged, tmp_path / "a.onnx", SPEC)
    for precision in ("fp16", "int8"):
        exporter.export(merged, tmp_path / "a.onnx", replace(SPEC, precision=precision))


def test_the_size_limit_of_a_fleet_counts_its_float32_tables(
    make_tuned: Callable[..., TunedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MixedModel(make_tuned("aoft-lora-star"))
    backbone = sum(4 * tensor.numel() for tensor in model.state_dict().values())
    columns = model.layout.row(make_tuned("aoft-lora-star").trained()).numel()
    tables = FleetTables(
        bank=np.zeros((backbone // (4 * columns), columns), np.float32),
        heads=np.zeros((5, 33), np.float32),
        first=np.zeros(1, np.int64),
        count=np.array([5]),
        columns=np.arange(5),
    )
    monkeypatch.setattr(exporter, "SINGLE_FILE_LIMIT", 1.4 * backbone)
    with pytest.raises(OutputError, match=r"Backbone and tasks take .* in fp16, .*: export fewer"):
        exporter.export_fleet(model, tmp_path / "a.onnx", replace(SPEC, precision="fp16"), tables)


def test_the_engine_reports_the_files_metadata_and_input_form(
    artefact: Path, pixel_artefact: Path
) -> None:
    engine = exporter.load(artefact)
    assert not engine.takes_pixels
    assert json.loads(engine.info["preprocessing"])["size"] == 16
    x = inputs(3)
    np.testing.assert_array_equal(engine.run(x), run(artefact, x))
    other = exporter.load(pixel_artefact, EngineOptions(threads=1))
    assert other.takes_pixels
    np.testing.assert_allclose(
        other.run(pixels(3)), run(pixel_artefact, pixels(3)), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.999])
def test_a_truncated_artefact_is_refused(kept: float, artefact: Path, tmp_path: Path) -> None:
    data = artefact.read_bytes()
    path = tmp_path / "a.onnx"
    path.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    with pytest.raises(ArtefactError, match="is no ONNX model, or a damaged one"):
        exporter.load(path)


def test_a_missing_artefact_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "a.onnx", tmp_path):
        with pytest.raises(ArtefactError, match="There is no file"):
            exporter.load(path)


def test_a_graph_without_inputs_is_refused(tmp_path: Path) -> None:
    value = helper.make_tensor("logits", TensorProto.FLOAT, [1], [0.0])
    node = helper.make_node("Constant", [], ["logits"], value=value)
    result = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1])
    graph = helper.make_graph([node], "constant", [], [result])
    opset = helper.make_opsetid("", 20)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), tmp_path / "a.onnx")
    with pytest.raises(ArtefactError, match="is no ONNX model that can be run"):
        exporter.load(tmp_path / "a.onnx")


@pytest.mark.slow
def test_a_full_vit_b_16_is_exact_and_has_no_additional_operators(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = timm.create_model("vit_base_patch16_224", num_classes=100).eval()
    with torch.no_grad():
        plain.get_parameter("head.weight").normal_(0, 0.04)  # logits of about 1
    tuned = attach(plain, "rlrr", backbone=identify(plain)).eval()
    path = tmp_path / "b16.onnx"
    spec = export_spec(224, False, MEAN, STD, {})
    exporter.export(merge(tuned), path, spec)
    engine = exporter.load(path, EngineOptions(threads=2))
    for batch in (1, 2, 7):
        x = inputs(batch, 224)
        expected, logits = logits_of(tuned, x), engine.run(x)
        assert np.ptp(expected) > 1
        assert np.abs(logits - expected).max() <= 5e-5
        assert (logits.argmax(1) == expected.argmax(1)).all()
    for depth in (1, 2):
        shallow = timm.create_model("vit_base_patch16_224", num_classes=100, depth=depth)
        exporter.export(randomised(shallow), tmp_path / f"{depth}.onnx", spec)
    full = operators(onnx.load(path))
    one, two = (operators(onnx.load(tmp_path / f"{depth}.onnx")) for depth in (1, 2))
    block = {name: two[name] - one[name] for name in two}
    assert full == Counter({name: one[name] + 11 * block[name] for name in two})
