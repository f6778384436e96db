"""Low precision: judged by answers about real images, refused below the bar, updates in float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from aoft_deploy.cli.export import main
from aoft_deploy.errors import ImageError, VerificationError
from aoft_deploy.export import export_merged
from aoft_deploy.fleet import Fleet
from aoft_deploy.images import image_files
from aoft_deploy.verification import Bar, verify
from aoft_exporters import onnx as exporter


def rows(values: list[list[float]]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda pixels: np.array(values, np.float32)[pixels[:, 0, 0, 0]]


IMAGES = np.zeros((4, 1, 1, 3), np.uint8) + np.arange(4, dtype=np.uint8)[:, None, None, None]


def test_agreement_counts_top_classes_and_the_bar_refuses_with_the_figures() -> None:
    right = [[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 3.0]]
    one_off = [[5.0, 0.0], [0.0, 9.0], [0.1, 0.0], [3.0, 1.0]]
    report = verify(rows(right), rows(one_off), IMAGES, bar=Bar(float("inf"), 0.75))
    assert (report.agreement, report.tolerance, report.min_agreement) == (0.75, None, 0.75)
    assert json.loads(json.dumps(report.to_dict()))["max_abs"] == 8.0
    with pytest.raises(VerificationError, match=r"agrees .* in 75\.00% .* 4 images, .* 76\.00%"):
        verify(rows(right), rows(one_off), IMAGES, bar=Bar(float("inf"), 0.76))
    nan = [[np.nan, 0.0], *one_off[1:]]
    with pytest.raises(VerificationError, match="finite values are expected"):
        verify(rows(right), rows(nan), IMAGES, bar=Bar(float("inf"), 0.0))


def test_int8_has_integer_weights_a_float_classifier_and_the_figures_in_its_manifest(
    checkpoint: Path, backbone_weights: Path, photos: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "int8.onnx"
    exported = export_merged(
        checkpoint,
        output,
        weights=backbone_weights,
        precision="int8",
        images=[photos[0].parent],
        min_agreement=0.5,
    )
    manifest = json.loads(exported.manifest.read_text("utf-8"))
    assert manifest["precision"] == "int8"
    assert manifest["verification"]["images"] == manifest["verification"]["real_images"]
    assert manifest["verification"]["tolerance"] is None
    assert manifest["verification"]["max_abs"] > 0
    graph = onnx.load(output).graph
    types = {i.name: i.data_type for i in graph.initializer}
    integers = [n for n, kind in types.items() if kind == onnx.TensorProto.INT8]
    assert any("attn.qkv.weight" in n for n in integers)
    assert any("mlp.fc2.weight" in n for n in integers)
    assert not any("head" in n for n in integers)
    assert types["head.weight"] == onnx.TensorProto.FLOAT
    assert exporter.load(output).info["precision"] == "int8"


def test_int8_without_images_and_agreement_below_the_bar_are_refused(
    checkpoint: Path,
    backbone_weights: Path,
    photos: list[Path],
    refused: Callable[..., str],
    tmp_path: Path,
) -> None:
    options = ["--merge", checkpoint, "--backbone-weights", backbone_weights]
    options += ["-o", tmp_path / "a.onnx"]
    line = refused(main, *options, "--precision", "int8")
    assert "judged by its answers about real images" in line
    line = refused(main, *options, "--precision", "int4")
    assert "Unknown precision of --to onnx 'int4'. Did you mean int8?" in line
    line = refused(main, *options, "--min-agreement", "99")
    assert "--min-agreement is 99.0, but is a share from 0 to 1" in line
    folder = tmp_path / "none"
    folder.mkdir()
    with pytest.raises(ImageError, match="There are no images in the folder"):
        image_files([photos[0], folder])


def test_a_fleet_in_int8_keeps_its_tasks_numbers_and_takes_new_tasks(
    make_checkpoint: Callable[..., Path],
    backbone_weights: Path,
    photos: list[Path],
    tmp_path: Path,
) -> None:
    source = make_checkpoint("aoft-lora-star")
    tasks = []
    for name in ("one", "two", "three"):
        tasks.append(tmp_path / f"{name}.ckpt")
        tasks[-1].write_bytes(source.read_bytes())
    options = ["--fleet", *tasks[:2], "--backbone-weights", backbone_weights, "--min-agreement"]
    output = tmp_path / "fleet.onnx"
    images = ["--images", *photos, "--precision", "int8", "-o", output]
    assert main([str(o) for o in [*options, 0.5, *images]]) == 0
    types = {i.name: i.data_type for i in onnx.load(output).graph.initializer}
    integers = [n for n, kind in types.items() if kind == onnx.TensorProto.INT8]
    assert any("attn.qkv.weight" in n for n in integers)
    assert types["bank"] == types["heads"] == onnx.TensorProto.FLOAT
    fleet = Fleet(output, threads=1)
    fleet.add(tasks[2])
    picture = np.random.default_rng(0).normal(size=(1, 3, 16, 16)).astype(np.float32)
    one, three = (fleet.predict(picture, [name])[0] for name in ("one", "three"))
    assert np.array_equal(one, three)
