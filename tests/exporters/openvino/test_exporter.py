"""OpenVINO folders: the unmerged model's logits in the artefact's precision, or a refusal."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from specs import export_spec
from torch import nn

from aoft_deploy.artefacts.engine import EngineOptions
from aoft_deploy.artefacts.prediction import load_classifier
from aoft_deploy.artefacts.registry import get_exporter, load_artefact
from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.cli.export import main
from aoft_deploy.cli.inspect import describe
from aoft_deploy.cli.predict import main as predict
from aoft_deploy.errors import ArtefactError, MissingExtraError, SettingError
from aoft_deploy.export.calibration import MOST, calibration_files
from aoft_deploy.export.merged import export_merged
from aoft_deploy.export.options import VerifyOptions
from aoft_deploy.tuning.merging import merge
from aoft_deploy.tuning.tuned_model import TunedModel
from aoft_exporters.openvino import exporter
from aoft_exporters.openvino.engine import OpenvinoEngine, load
from aoft_exporters.openvino.files import MARKER

BIN = "openvino_model.bin"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SPEC = export_spec(16, False, MEAN, STD, {"classes": '["日本"]', "empty": ""})


def inputs(batch: int) -> NDArray[np.float32]:
    return np.random.default_rng(batch).normal(0, 1, (batch, 3, 16, 16)).astype(np.float32)


def pixels_of(folder: Path) -> NDArray[np.uint8]:
    return np.stack([np.asarray(Image.open(p).resize((16, 16))) for p in sorted(folder.iterdir())])


def normalised(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Reference in float64, rounded once."""
    scaled = (pixels / 255 - np.array(MEAN)) / np.array(STD)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), np.float32)


def logits_of(model: nn.Module, x: NDArray[np.float32]) -> NDArray[np.float32]:
    with torch.inference_mode():
        logits: NDArray[np.float32] = model(torch.from_numpy(x)).numpy()
    return logits


def computes_bf16() -> bool:
    core: Any = importlib.import_module("openvino").Core()
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.fixture(scope="module")
def merged(make_tuned: Callable[..., TunedModel]) -> nn.Module:
    return merge(make_tuned("rlrr"))


@pytest.fixture(scope="module")
def folder(checkpoint: Path, backbone_weights: Path, tmp_path_factory: Any) -> Path:
    """A task exported by the command, in fp32."""
    path: Path = tmp_path_factory.mktemp("openvino") / "task.openvino"
    options = ["--merge", checkpoint, "--backbone-weights", backbone_weights, "--to", "openvino"]
    assert main([*map(str, options), "-o", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def many(make_picture: Callable[..., Image.Image], tmp_path_factory: Any) -> Path:
    """A folder of forty images, none of them among ``photos``."""
    folder: Path = tmp_path_factory.mktemp("many")
    for i in range(40):
        make_picture(20 + i % 7, 24, seed=100 + i).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def int8(
    checkpoint: Path, backbone_weights: Path, photos: list[Path], many: Path, tmp_path_factory: Any
) -> Path:
    """A task exported by the library, in int8."""
    exported = export_merged(
        checkpoint,
        tmp_path_factory.mktemp("int8") / "task",
        to="openvino",
        precision="int8",
        backbone=BackboneSource(weights=backbone_weights),
        verify=VerifyOptions(images=[photos[0].parent], calibrate=[many], min_agreement=0.8),
    )
    return exported.path


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_the_artefact_gives_the_unmerged_logits(
    batch: int, folder: Path, make_tuned: Callable[..., TunedModel]
) -> None:
    x = inputs(batch)
    expected = logits_of(make_tuned("rlrr"), x)
    assert np.ptp(expected) > 0.5
    logits = load(folder, EngineOptions(threads=1)).run(x)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, atol=5e-5, rtol=0)


def test_the_folder_holds_only_the_graph_and_its_weights(folder: Path, merged: nn.Module) -> None:
    assert sorted(os.listdir(folder)) == [BIN, MARKER]
    parameters = sum(tensor.numel() for tensor in merged.state_dict().values())
    assert 4 * parameters <= (folder / BIN).stat().st_size < 4 * parameters + 4000
    manifest = json.loads(folder.with_name(f"{folder.name}.json").read_text("utf-8"))
    assert manifest["exporter"] == "openvino"
    assert manifest["versions"]["openvino"]
    assert "calibration" not in manifest


def test_no_path_of_the_exporting_machine_is_in_the_artefact(folder: Path) -> None:
    text = (folder / MARKER).read_text("utf-8")
    assert str(folder.parent) not in text
    assert ".aoft-" not in text


def test_the_engine_uses_the_requested_threads_and_precision(folder: Path, int8: Path) -> None:
    engine = load(folder, EngineOptions(threads=1))
    assert (engine.threads, engine.arithmetic) == (1, "f32")
    assert load(folder, EngineOptions(threads=2)).threads == 2
    assert load(int8).arithmetic == "f32"


def test_the_artefact_is_found_by_suffix_and_by_its_marker(folder: Path, int8: Path) -> None:
    for path in (folder, int8):
        engine = load_artefact(path)
        assert isinstance(engine, OpenvinoEngine)
        assert engine.info["format"] == "aoft-deploy/1"


def test_the_metadata_are_read_back_unchanged(
    merged: nn.Module, folder: Path, classes: tuple[str, ...], tmp_path: Path
) -> None:
    special = {"classes": '["日本", "a\\"<&>\'", " b\\n"]', "empty": "", "number": "1.50"}
    spec = export_spec(16, False, MEAN, STD, special)
    exporter.export(merged, tmp_path / "a", spec)
    found = dict(load(tmp_path / "a").info)
    assert re.fullmatch("[0-9a-f]{64}", found.pop("files_sha256"))
    assert found == {**special, "precision": "fp32"}
    info = load(folder).info
    assert json.loads(info["classes"]) == list(classes)
    assert json.loads(info["preprocessing"])["size"] == 16
    assert (info["method"], info["precision"]) == ("rlrr", "fp32")


def test_the_same_input_gives_the_same_files(merged: nn.Module, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8)
    for precision in ("fp32", "int8"):
        spec = export_spec(16, False, MEAN, STD, {"a": "b"}, precision, pixels)
        for name in "xy":
            exporter.export(merged, tmp_path / f"{precision}{name}", spec)
        for file in (BIN, MARKER):
            first, second = ((tmp_path / f"{precision}{n}" / file).read_bytes() for n in "xy")
            assert first == second


def test_the_pixel_graph_takes_images_and_agrees_with_the_float_graph(
    checkpoint: Path, backbone_weights: Path, folder: Path, photos: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / "pixels.openvino"
    options = ["--merge", checkpoint, "--backbone-weights", backbone_weights, "--to", "openvino"]
    assert main([*map(str, options), "-o", str(path), "--uint8"]) == 0
    engine = load(path)
    assert engine.takes_pixels
    assert not load(folder).takes_pixels
    pictures = [Image.open(photo).convert("RGB") for photo in photos]
    exact, found = (load_classifier(p).scores(pictures) for p in (folder, path))
    np.testing.assert_allclose(found, exact, atol=2e-5, rtol=0)


def test_aoft_predict_answers_as_with_onnx(
    artefact: Path, folder: Path, photos: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    printed = []
    for path in (artefact, folder):
        capsys.readouterr()
        assert predict([str(path), *map(str, photos)]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != ""


def test_predicting_imports_neither_torch_nor_timm_nor_telemetry(
    folder: Path, photos: list[Path]
) -> None:
    code = (
        "import sys\nfrom aoft_deploy.cli.predict import main\nassert main(sys.argv[1:]) == 0\n"
        "heavy = {'torch', 'timm', 'onnx', 'onnxruntime', 'nncf', 'openvino_telemetry'}\n"
        "assert 'openvino' in sys.modules\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder), str(photos[0])], check=True)


def test_int8_keeps_the_top_classes_and_the_classifier_in_float32(
    int8: Path, folder: Path, many: Path, make_tuned: Callable[..., TunedModel]
) -> None:
    manifest = json.loads(int8.with_name("task.json").read_text("utf-8"))
    assert manifest["calibration"] == {"images": 40, "left_in_float": []}
    assert manifest["versions"]["nncf"]
    assert manifest["verification"]["agreement"] >= 0.8
    assert manifest["verification"]["real_images"] == 9
    x = normalised(pixels_of(many))
    expected, logits = logits_of(make_tuned("rlrr"), x), load(int8).run(x)
    assert 1e-4 < np.abs(logits - expected).max() < 0.1 * np.ptp(expected)
    core: Any = importlib.import_module("openvino").Core()
    nodes = core.read_model(int8 / MARKER).get_ops()
    constants = [node.output(0) for node in nodes if node.get_type_name() == "Constant"]
    kinds = {node.get_node().get_friendly_name(): node.element_type for node in constants}
    assert kinds["head.weight"].to_string() == "f32"
    integers = sorted(list(c.shape) for c in constants if c.element_type.to_string() == "i8")
    assert kinds["patch_embed.proj.weight"].to_string() == "f32"
    assert integers == sorted([*[[32, 32]] * 4, [128, 32], [32, 128]])
    saved = (folder / BIN).stat().st_size - (int8 / BIN).stat().st_size
    scales = 4096  # of channels and activations, and corrected biases
    assert 0 <= 3 * sum(rows * columns for rows, columns in integers) - saved < scales


def test_weights_use_seven_bits_so_that_no_pair_of_products_saturates(int8: Path) -> None:
    core: Any = importlib.import_module("openvino").Core()
    nodes = core.read_model(int8 / MARKER).get_ops()
    constants = [n for n in nodes if n.get_type_name() == "Constant"]
    weights = [n.get_data() for n in constants if n.get_element_type().to_string() == "i8"]
    assert len(weights) == 6
    for weight in weights:
        largest = np.abs(weight.astype(np.int64)).max(1)
        assert largest.max() in (63, 64)
        assert 2 * 255 * largest.max() < 2**15  # what AVX2's vpmaddubsw adds, two by two
        assert (largest >= 62).mean() > 0.9  # every output channel uses the full range


def test_the_openvino_manifest_names_the_arithmetic_of_its_verification(
    folder: Path, int8: Path
) -> None:
    for path, precision in ((folder, "fp32"), (int8, "int8")):
        manifest = json.loads(path.with_name(f"{path.name}.json").read_text("utf-8"))
        verification = manifest["verification"]
        assert verification["arithmetic"] == f"{precision} by openvino on CPU"
        assert "verified_on_device" not in verification


def test_products_that_change_top_classes_are_restored_to_float32(
    many: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 16, "depth": 1, "embed_dim": 32, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", patch_size=8, num_classes=5, **sizes).eval()
    pixels = pixels_of(many)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
        # attention scores so large that rounding to 8 bits changes the attended token
        model.get_parameter("blocks.0.attn.qkv.weight")[:64].mul_(12)
    x = normalised(pixels)
    expected = logits_of(model, x)
    classes, found = expected.argmax(1), {}
    for name, agreement in (("quantised", 0.0), ("restored", 0.95)):
        spec = export_spec(16, False, MEAN, STD, {}, "int8", pixels, min_agreement=agreement)
        exporter.export(model, tmp_path / name, spec)
        engine = load(tmp_path / name)
        logits = engine.run(x)
        found[name] = (
            float((logits.argmax(1) == classes).mean()),
            np.square(logits - expected).sum(),
        )
    assert found["quantised"][0] < 0.95 <= found["restored"][0]
    assert found["restored"][1] < 0.5 * found["quantised"][1]
    left = json.loads(engine.info["left_in_float"])
    assert left and len(set(left)) == len(left)
    assert "left_in_float" not in load(tmp_path / "quantised").info


def test_all_products_stay_in_int8_if_restoring_does_not_help(
    merged: nn.Module, many: Path, tmp_path: Path
) -> None:
    spec = export_spec(16, False, MEAN, STD, {}, "int8", pixels_of(many), min_agreement=1.1)
    exporter.export(merged, tmp_path / "a", spec)
    assert "left_in_float" not in load(tmp_path / "a").info


def test_an_int8_pixel_graph_is_calibrated_with_pixels(
    merged: nn.Module, many: Path, tmp_path: Path
) -> None:
    pixels = pixels_of(many)
    expected = logits_of(merged, normalised(pixels))
    exporter.export(merged, tmp_path / "a", export_spec(16, True, MEAN, STD, {}, "int8", pixels))
    logits = load(tmp_path / "a").run(pixels)
    assert np.abs(logits - expected).max() < 0.1 * np.ptp(expected)


def test_the_command_prints_no_output_of_nncf(
    checkpoint: Path, backbone_weights: Path, photos: list[Path], many: Path, tmp_path: Path
) -> None:
    options = ["--merge", checkpoint, "--backbone-weights", backbone_weights, "--to", "openvino"]
    options += ["--precision", "int8", "--images", *photos, "--calibrate", many]
    options += ["--min-agreement", 0.5, "-o", tmp_path / "a"]
    code = "import sys; from aoft_deploy.cli.export import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *map(str, options)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stderr == ""
    assert [line.split()[0] for line in result.stdout.splitlines()] == [
        str(tmp_path / "a"),
        "verified",
        "9",  # images, and the agreement that they show
        "manifest:",
        "next:",
    ]


def test_bf16_runs_in_bf16_or_the_processor_is_refused_by_name(
    checkpoint: Path,
    backbone_weights: Path,
    folder: Path,
    photos: list[Path],
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    options: list[Any] = ["--merge", checkpoint, "--backbone-weights", backbone_weights]
    options += ["--to", "openvino", "--precision", "bf16", "--images", *photos]
    options += ["--min-agreement", 0.8, "-o", tmp_path / "a"]
    if not computes_bf16():
        assert "does not compute in bf16" in refused(main, *options)
        text = (folder / MARKER).read_text("utf-8")
        other = tmp_path / "other"
        other.mkdir()
        (other / BIN).write_bytes((folder / BIN).read_bytes())
        (other / MARKER).write_text(
            text.replace('<precision value="fp32"', '<precision value="bf16"')
        )
        with pytest.raises(SettingError, match=r"The processor \(.+\) does not compute in bf16"):
            load(other)
        return
    assert main([str(option) for option in options]) == 0
    assert load(tmp_path / "a").arithmetic == "bf16"


def test_concurrent_threads_get_their_own_logits(folder: Path) -> None:
    engine = load(folder, EngineOptions(threads=1))
    batches = [inputs(1 + i % 9) for i in range(200)]
    expected = [engine.run(batch) for batch in batches[:9]]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(engine.run, batches))
    for i, answer in enumerate(answers):
        np.testing.assert_allclose(answer, expected[i % 9], atol=1e-6, rtol=0)


def test_logits_are_not_overwritten_by_the_next_run(folder: Path) -> None:
    engine = load(folder)
    first = engine.run(inputs(2))
    kept = first.copy()
    engine.run(-inputs(2))
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 3, 16, 16), np.float64),
        np.zeros((1, 16, 16, 3), np.uint8),
        np.zeros((1, 3, 16, 17), np.float32),
        np.zeros((3, 16, 16), np.float32),
        np.zeros((0, 3, 16, 16), np.float32),
    ],
    ids=lambda x: f"{x.dtype}{x.shape}",
)
def test_images_of_another_type_or_shape_are_refused(images: NDArray[Any], folder: Path) -> None:
    with pytest.raises(SettingError, match=r"takes float32 \[batch, 3, 16, 16\], but got"):
        load(folder).run(images)


@pytest.mark.parametrize("file", [BIN, MARKER])
@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.999])
def test_a_truncated_artefact_is_refused(
    file: str, kept: float, folder: Path, tmp_path: Path
) -> None:
    for name in (BIN, MARKER):
        data = (folder / name).read_bytes()
        end = (
            len(data) if name != file else kept if isinstance(kept, int) else int(kept * len(data))
        )
        (tmp_path / name).write_bytes(data[:end])
    with pytest.raises(ArtefactError, match="is no OpenVINO model") as error:
        load(tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_an_onnx_file_with_external_weights_is_refused_before_openvino_opens_them(
    artefact: Path, tmp_path: Path
) -> None:
    import onnx

    proto = onnx.load(artefact)
    tensor = proto.graph.initializer[0]
    onnx.external_data_helper.set_external_data(tensor, "missing.bin")
    tensor.ClearField("raw_data")
    (tmp_path / "a.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ArtefactError, match="keeps weights in other files"):
        load_artefact(tmp_path / "a.onnx", EngineOptions(engine="openvino"))


def test_aoft_inspect_describes_an_openvino_artefact(folder: Path, int8: Path) -> None:
    found = describe(int8)
    assert (found["kind"], found["precision"], found["method"]) == (
        "OpenVINO artefact",
        "int8",
        "rlrr",
    )
    assert found["manifest"] == describe(folder)["manifest"] == "matches"
    assert found["operators"]["FakeQuantize"] > 5
    assert found["bytes"] < describe(folder)["bytes"]


@pytest.mark.parametrize("file", [BIN, MARKER])
def test_aoft_inspect_refuses_a_damaged_artefact(file: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / MARKER).write_bytes((folder / MARKER).read_bytes())
    (tmp_path / BIN).write_bytes((folder / BIN).read_bytes())
    (tmp_path / BIN).unlink() if file == BIN else (tmp_path / MARKER).write_text("<net>")
    with pytest.raises(ArtefactError, match="is no OpenVINO model"):
        describe(tmp_path)


def test_a_missing_artefact_and_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.openvino").write_text("")
    for path in (tmp_path, tmp_path / "a.openvino", tmp_path / "none.openvino"):
        with pytest.raises(ArtefactError, match=r"There is no folder .* with an openvino_model"):
            load(path)


def test_another_programs_model_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / BIN).write_bytes((folder / BIN).read_bytes())
    text = (folder / MARKER).read_text("utf-8")
    for start, end in (("<aoft>", "</aoft>"), ("<precision", "/>")):
        before, _, rest = text.partition(start)
        (tmp_path / MARKER).write_text(before + rest.partition(end)[2])
        with pytest.raises(ArtefactError, match="was not written by aoft-export"):
            load(tmp_path)


def test_a_graph_that_cannot_be_compiled_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / BIN).write_bytes((folder / BIN).read_bytes())
    text = (folder / MARKER).read_text("utf-8")
    (tmp_path / MARKER).write_text(text.replace('type="MatMul"', 'type="NoSuchOperator"'))
    with pytest.raises(ArtefactError):
        load(tmp_path)


@pytest.mark.parametrize("package", ["openvino", "nncf"])
def test_a_missing_package_is_named_with_its_extra(
    package: str, merged: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    pixels = np.zeros((16, 16, 16, 3), np.uint8)
    spec = export_spec(16, False, MEAN, STD, {}, "int8", pixels)
    with pytest.raises(MissingExtraError, match=rf"{package} is .* 'aoft-deploy\[openvino\]'"):
        exporter.export(merged, tmp_path / "a", spec)
    assert not (tmp_path / "a").exists()


def test_int8_without_calibration_images_is_refused(merged: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(
        SettingError, match="int8 of openvino needs calibration images: give them with `calibrate`"
    ):
        exporter.export(merged, tmp_path / "a", export_spec(16, False, MEAN, STD, {}, "int8"))


def test_missing_unused_or_too_few_calibration_images_are_refused(
    checkpoint: Path,
    backbone_weights: Path,
    photos: list[Path],
    many: Path,
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    options: list[Any] = ["--merge", checkpoint, "--backbone-weights", backbone_weights]
    options += ["-o", tmp_path / "a.onnx", "--images", *photos]
    line = refused(main, *options, "--to", "openvino", "--precision", "int8")
    assert "give 16 or more training images of the task, or a folder of them, with" in line
    few = ["--to", "openvino", "--precision", "int8", "--calibrate", *photos]
    assert "gives 0 images that are not among --images, but 16 or more" in refused(
        main, *options, *few
    )
    for unused in (["--to", "openvino"], ["--precision", "int8"], ["--to", "timm"]):
        line = refused(main, *options, *unused, "--calibrate", many)
        assert "needs no calibration images: leave --calibrate out" in line


def test_calibration_images_are_refused_for_a_fleet_in_fp32(
    checkpoint: Path, many: Path, refused: Callable[..., str]
) -> None:
    line = refused(main, "--fleet", checkpoint, "--to", "openvino", "--calibrate", many)
    assert "needs no calibration images: leave --calibrate out" in line


def test_calibration_excludes_verification_images_and_uses_a_subset_of_many(
    many: Path, tmp_path: Path
) -> None:
    openvino = get_exporter("openvino")
    judged = sorted(many.iterdir())[::2]
    files = calibration_files(openvino, "int8", VerifyOptions(judged, [many, many]))
    assert files == sorted(many.iterdir())[1::2]
    for i in range(3 * MOST):
        (tmp_path / f"{i:04}.png").touch()
    files = calibration_files(openvino, "int8", VerifyOptions(calibrate=[tmp_path]))
    assert [path.name for path in files] == [f"{i:04}.png" for i in range(0, 3 * MOST, 3)]
