"""Low precision is verified on real images, and refused below the minimum agreement."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from aoft_deploy.artefacts.verification import Bar, verify
from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.checkpoints.checkpoint import save
from aoft_deploy.cli.export import main
from aoft_deploy.cli.inspect import main as inspect_main
from aoft_deploy.cli.predict import main as predict_main
from aoft_deploy.data.images import read_image
from aoft_deploy.data.listing import image_files
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import ImageError, SettingError, VerificationError
from aoft_deploy.export.merged import export_merged
from aoft_deploy.export.options import VerifyOptions
from aoft_deploy.fleet.fleet import Fleet
from aoft_deploy.tuning.tuned_model import TunedModel
from aoft_exporters.onnx import exporter


def rows(values: list[list[float]]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda pixels: np.array(values, np.float32)[pixels[:, 0, 0, 0]]


IMAGES = np.zeros((4, 1, 1, 3), np.uint8) + np.arange(4, dtype=np.uint8)[:, None, None, None]


def test_agreement_is_the_share_of_equal_top_classes_and_a_low_one_is_refused() -> None:
    expected = np.array([[1, 0], [0, 1], [2, 0], [0, 3]], np.float32)
    one_wrong = [[5.0, 0.0], [0.0, 9.0], [0.1, 0.0], [3.0, 1.0]]
    report = verify(expected, rows(one_wrong), IMAGES, bar=Bar(float("inf"), 0.75))
    assert (report.agreement, report.tolerance, report.min_agreement) == (0.75, None, 0.75)
    assert json.loads(json.dumps(report.to_dict()))["max_abs"] == 8.0
    with pytest.raises(VerificationError, match=r"4 images agree .* in 75\.00% .* 76\.00%"):
        verify(expected, rows(one_wrong), IMAGES, bar=Bar(float("inf"), 0.76))
    nan = [[np.nan, 0.0], *one_wrong[1:]]
    with pytest.raises(VerificationError, match="finite values are expected"):
        verify(expected, rows(nan), IMAGES, bar=Bar(float("inf"), 0.0))


def test_int8_has_integer_weights_and_a_float_classifier(
    checkpoint: Path, backbone_weights: Path, photos: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "int8.onnx"
    exported = export_merged(
        checkpoint,
        output,
        precision="int8",
        backbone=BackboneSource(weights=backbone_weights),
        verify=VerifyOptions(images=[photos[0].parent], min_agreement=0.5),
    )
    manifest = json.loads(exported.manifest.read_text("utf-8"))
    assert manifest["precision"] == "int8"
    assert manifest["verification"]["images"] == manifest["verification"]["real_images"]
    assert manifest["verification"]["tolerance"] is None
    assert manifest["verification"]["max_abs"] > 0
    graph = onnx.load(output).graph
    types = {i.name: i.data_type for i in graph.initializer}
    integers = [n for n, kind in types.items() if kind == TensorProto.INT8]
    assert any("attn.qkv.weight" in n for n in integers)
    assert any("mlp.fc2.weight" in n for n in integers)
    assert not any("head" in n for n in integers)
    assert types["head.weight"] == TensorProto.FLOAT
    assert exporter.load(output).info["precision"] == "int8"


def test_int8_without_images_and_invalid_options_are_refused(
    checkpoint: Path,
    backbone_weights: Path,
    photos: list[Path],
    refused: Callable[..., str],
    tmp_path: Path,
) -> None:
    options = ["--merge", checkpoint, "--backbone-weights", backbone_weights]
    options += ["-o", tmp_path / "a.onnx"]
    line = refused(main, *options, "--precision", "int8")
    assert "is verified on real images" in line
    line = refused(main, *options, "--precision", "int4")
    assert "Unknown precision of onnx 'int4'. Did you mean int8?" in line
    line = refused(main, *options, "--min-agreement", "99")
    assert "--min-agreement is 99.0, but must be a share from 0 to 1" in line
    folder = tmp_path / "none"
    folder.mkdir()
    with pytest.raises(ImageError, match="There are no images in the folder"):
        image_files([photos[0], folder])


def test_an_int8_fleet_gives_each_task_the_answers_of_its_own_model(
    make_checkpoint: Callable[..., Path],
    make_tuned: Callable[..., TunedModel],
    backbone_weights: Path,
    photos: list[Path],
    tmp_path: Path,
) -> None:
    names = ("one", "two", "three")
    tasks = []
    for seed, name in enumerate(names):
        tasks.append(tmp_path / f"{name}.ckpt")
        tasks[-1].write_bytes(make_checkpoint("aoft-lora-star", seed=seed).read_bytes())
    options = ["--fleet", *tasks[:2], "--backbone-weights", backbone_weights, "--min-agreement"]
    output = tmp_path / "fleet.onnx"
    images = ["--images", *photos, "--precision", "int8", "-o", output]
    assert main([str(o) for o in [*options, 0.5, *images]]) == 0
    types = {i.name: i.data_type for i in onnx.load(output).graph.initializer}
    integers = [n for n, kind in types.items() if kind == TensorProto.INT8]
    assert any("attn.qkv.weight" in n for n in integers)
    assert types["bank"] == types["heads"] == TensorProto.FLOAT
    fleet = Fleet(output, threads=1)
    fleet.add(tasks[2])
    x = np.random.default_rng(0).normal(size=(6, 3, 16, 16)).astype(np.float32)
    with torch.inference_mode():
        expected = {
            name: make_tuned("aoft-lora-star", seed=seed)(torch.from_numpy(x)).numpy()
            for seed, name in enumerate(names)
        }
    found = {
        name: np.stack([a.logits for a in fleet.predict(x, [name] * len(x))]) for name in names
    }
    mixed = [a.logits for a in fleet.predict(x, [names[i % 3] for i in range(len(x))])]
    for i, name in enumerate(names):
        error = np.abs(found[name] - expected[name]).max()
        assert 0 < error < 0.1 * np.abs(expected[name]).max()
        for other in set(names) - {name}:
            assert np.abs(found[name] - expected[other]).max() > 3 * error
        for row in range(i, len(x), 3):  # the int8 ranges are those of the complete batch
            assert np.abs(mixed[row] - expected[name][row]).max() < 2 * error


def test_int8_below_the_minimum_agreement_is_refused(
    make_tuned: Callable[..., TunedModel],
    backbone_weights: Path,
    photos: list[Path],
    refused: Callable[..., str],
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
) -> None:
    """Float32 and int8 choose different classes for at least one image."""
    tuned = make_tuned("rlrr")
    bias = tuned.trained()["head.head.bias"]
    preprocessing = Preprocessing(16, crop_pct=0.9, mean=(0.5,) * 3, std=(0.5,) * 3)
    task = tmp_path_factory.mktemp("tie") / "tie.ckpt"

    def saved() -> Path:
        save(tuned, task, classes=tuple("abcde"), preprocessing=preprocessing, training={})
        return task

    with torch.no_grad():
        bias[:2] += 20
        first = task.with_name("first.onnx")
        export_merged(
            saved(),
            first,
            precision="int8",
            backbone=BackboneSource(weights=backbone_weights),
            verify=VerifyOptions(images=photos, min_agreement=0),
        )
        x = np.stack([preprocessing(read_image(path)) for path in image_files(photos)])
        run = exporter.load(first).run  # batches of 7, as in verification: ranges depend on it
        logits = tuned(torch.from_numpy(x)).numpy(), np.concatenate([run(x[:7]), run(x[7:])])
        exact, rounded = (each[:, 1] - each[:, 0] for each in logits)
        image = np.abs(rounded - exact).argmax()
        bias[1] -= float(rounded[image] + exact[image]) / 2
    options = ["--merge", saved(), "--backbone-weights", backbone_weights, "--precision", "int8"]
    options += ["-o", tmp_path / "a.onnx", "--images", photos[0].parent]
    line = refused(main, *options, "--min-agreement", "1")
    assert re.match(
        r"The decisions about 9 images agree with the unmerged model's in \d+\.\d\d% \(\d of 9\), "
        r"but at least 100\.00% is required: nothing is written",
        line,
    )
    share = float(re.findall(r"in (\d+\.\d+)%", line)[0])
    assert main([*map(str, options), "--min-agreement", str(share / 100 - 1e-3)]) == 0


WEIGHTS = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16, "tf32": TensorProto.FLOAT}
ROUNDED = {"fp16": "every result", "bf16": "every result", "tf32": "every factor of a product"}


@pytest.mark.parametrize(("to", "fleet"), [("onnx", False), ("onnx", True), ("triton", False)])
@pytest.mark.parametrize("precision", WEIGHTS)
def test_a_low_precision_is_that_of_products_and_named_in_artefact_and_manifest(
    precision: str,
    fleet: bool,
    to: str,
    make_checkpoint: Callable[..., Path],
    backbone_weights: Path,
    photos: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    task, output = tmp_path / "task.ckpt", tmp_path / ("low.onnx" if to == "onnx" else "low")
    task.write_bytes(make_checkpoint("aoft-lora-star").read_bytes())
    options = ["--fleet" if fleet else "--merge", task, "--backbone-weights", backbone_weights]
    options += ["--precision", precision, "--images", photos[0].parent, "--to", to, "-o", output]
    assert main([str(option) for option in options]) == 0
    printed = capsys.readouterr().out
    assert f"NOT VERIFIED ON DEVICE: no runtime on the CPU computes in {precision}" in printed
    proto = onnx.load(output if to == "onnx" else output / "1" / "model.onnx")
    types = {i.name: i.data_type for i in proto.graph.initializer}
    assert types["blocks.0.mlp.fc1.weight"] == WEIGHTS[precision]
    assert types["head.weight" if not fleet else "bank"] == TensorProto.FLOAT
    assert types["blocks.0.norm1.weight"] == TensorProto.FLOAT
    values = [*proto.graph.input, *proto.graph.output]
    kinds = {v.name: v.type.tensor_type.elem_type for v in values}
    assert kinds["pixel_values"] == kinds["logits"] == TensorProto.FLOAT
    one_operator = to == "onnx" or precision == "bf16"
    assert proto.opset_import[0].version == (23 if one_operator else 20)
    assert ("Attention" in {node.op_type for node in proto.graph.node}) is one_operator
    manifest = json.loads(output.with_name(f"{output.name}.json").read_text("utf-8"))
    assert manifest["precision"] == precision
    assert 1e-5 < manifest["verification"]["max_abs"] < 0.05
    assert manifest["verification"]["agreement"] >= 0.99
    assert manifest["verification"]["verified_on_device"] is False
    assert manifest["verification"]["arithmetic"] == (
        f"{precision} emulated in float32, {ROUNDED[precision]} rounded, by onnxruntime on CPU"
    )
    assert inspect_main([str(output)]) == 0
    assert re.search(rf"^precision +{precision}$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_a_cpu_computes_fp16_and_tf32_artefacts_in_float32(
    precision: str,
    checkpoint: Path,
    backbone_weights: Path,
    photos: list[Path],
    make_tuned: Callable[..., TunedModel],
    tmp_path: Path,
) -> None:
    exported = export_merged(
        checkpoint,
        tmp_path / "a.onnx",
        precision=precision,
        backbone=BackboneSource(weights=backbone_weights),
        verify=VerifyOptions(images=photos),
    )
    x = np.random.default_rng(0).normal(size=(3, 3, 16, 16)).astype(np.float32)
    with torch.inference_mode():
        exact = make_tuned("rlrr")(torch.from_numpy(x)).numpy()
    found = exporter.load(exported.path).run(x)
    allowed = {"tf32": 5e-5, "fp16": 5e-3}[precision]
    np.testing.assert_allclose(found, exact, atol=allowed * np.abs(exact).max(), rtol=0)


def test_a_bf16_artefact_is_refused_on_a_cpu_with_the_next_step(
    make_checkpoint: Callable[..., Path],
    backbone_weights: Path,
    photos: list[Path],
    refused: Callable[..., str],
    tmp_path: Path,
) -> None:
    task, paths = tmp_path / "task.ckpt", [tmp_path / "merged.onnx", tmp_path / "fleet.onnx"]
    task.write_bytes(make_checkpoint("aoft-lora-star").read_bytes())
    for source, path in zip(("--merge", "--fleet"), paths, strict=True):
        options = [source, task, "--backbone-weights", backbone_weights, "-o", path]
        options += ["--precision", "bf16", "--images", photos[0].parent]
        assert main([str(option) for option in options]) == 0
    line = refused(predict_main, paths[0], photos[0])
    assert line == (
        f"{paths[0]} is in bf16, which ONNX Runtime computes on a GPU only: choose --device cuda, "
        "or export in fp32 or int8 for a CPU."
    )
    with pytest.raises(SettingError, match="is in bf16, which ONNX Runtime computes on a GPU only"):
        Fleet(paths[1])


def test_an_unsupported_opset_is_refused(
    checkpoint: Path,
    backbone_weights: Path,
    photos: list[Path],
    refused: Callable[..., str],
    tmp_path: Path,
) -> None:
    options = ["--merge", checkpoint, "--backbone-weights", backbone_weights, "--images", photos[0]]
    options += ["-o", tmp_path / "a.onnx", "--precision"]
    line = refused(main, *options, "bf16", "--opset", 20)
    assert "bf16 of onnx needs opset 23, not 20: leave --opset out" in line
    line = refused(main, "--merge", checkpoint, "--opset", 17, "-o", tmp_path / "a.onnx")
    assert "opset 17 is not supported by onnx; supported: 23, 20" in line
    line = refused(main, "--merge", checkpoint, "--to", "timm", "--opset", 20)
    assert "opset 20 is not supported by timm; leave --opset out" in line
    assert not list(tmp_path.iterdir())
