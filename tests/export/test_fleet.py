"""aoft-export --fleet: many tasks, one verified graph."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from aoft_deploy.artefacts.prediction import load_classifier
from aoft_deploy.artefacts.verification import BATCH_SIZES, Bar
from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.checkpoints.checkpoint import save
from aoft_deploy.checkpoints.opening import open_checkpoint
from aoft_deploy.classes import Classes
from aoft_deploy.cli.export import main
from aoft_deploy.cli.predict import main as predict
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import AoftError, AttachError, SettingError, VerificationError
from aoft_deploy.export.fleet import _verified, export_fleet
from aoft_deploy.export.options import VerifyOptions
from aoft_deploy.tuning.attaching import attach
from aoft_deploy.tuning.backbones.backbone import create_backbone
from aoft_exporters.onnx import exporter

CLASSES = {"cats": ("tabby", "siamese"), "dogs": ("pug", "husky", "collie"), "日": ("a", "b")}
METHODS = ("aoft-lora-star", "rlrr", "aoft-vpt", "adapter")


@pytest.fixture(scope="module")
def make_task(
    backbone_name: str, backbone_args: dict[str, Any], backbone_weights: Path
) -> Callable[..., Path]:
    """Write a task's checkpoint, in which every parameter differs from its initial value."""

    def make(
        folder: Path, name: str, method: str, size: int = 16, seed: int = 0, **settings: Any
    ) -> Path:
        classes = CLASSES.get(name, ("x", "y"))
        model, identity = create_backbone(
            backbone_name, num_classes=len(classes), weights=backbone_weights, **backbone_args
        )
        tuned = attach(model, method, backbone=identity, **settings)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in tuned.trained().values():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        path = folder / f"{name}.ckpt"
        half = (0.5, 0.5, 0.5)
        save(tuned, path, classes=classes, preprocessing=Preprocessing(size, 1.0, half, half))
        return path

    return make


@pytest.fixture(scope="module", params=METHODS)
def fleet(
    request: pytest.FixtureRequest,
    make_task: Callable[..., Path],
    backbone_weights: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A fleet of three tasks, with their checkpoints in the same folder."""
    folder = tmp_path_factory.mktemp(request.param)
    tasks = [make_task(folder, n, request.param, seed=i) for i, n in enumerate(CLASSES)]
    options = ["--fleet", *tasks, "--backbone-weights", backbone_weights]
    output = folder / "fleet.onnx"
    assert main([str(option) for option in [*options, "-o", output]]) == 0
    return output


def test_each_image_gets_the_logits_of_its_tasks_unmerged_model(
    fleet: Path, backbone_weights: Path
) -> None:
    engine = exporter.load(fleet)
    images = np.random.default_rng(0).normal(size=(9, 3, 16, 16)).astype(np.float32)
    expected = []
    for name in CLASSES:
        tuned, _ = open_checkpoint(
            fleet.with_name(f"{name}.ckpt"), BackboneSource(weights=backbone_weights)
        )
        with torch.inference_mode():
            expected.append(tuned(torch.from_numpy(images)).numpy())
    for order in ([0, 1, 2, 2, 1, 0, 1, 1, 0], [1] * 9, [2, 2, 0, 0, 0, 1, 2, 1, 0]):
        logits = engine.run(images, np.array(order))
        assert logits.shape == (9, 3)
        for sample, task in enumerate(order):
            width = expected[task].shape[1]
            assert np.abs(logits[sample, :width] - expected[task][sample]).max() < 5e-5
            assert np.isneginf(logits[sample, width:]).all()


def test_manifest_and_metadata_hold_tasks_classes_and_verification(fleet: Path) -> None:
    manifest = json.loads(fleet.with_name("fleet.onnx.json").read_text("utf-8"))
    info = exporter.load(fleet).info
    assert manifest["tasks"] == json.loads(info["tasks"])
    assert {t["name"]: tuple(t["classes"]) for t in manifest["tasks"]} == CLASSES
    assert manifest["verification"]["max_abs"] < 5e-5
    assert manifest["verification"]["agreement"] == 1.0
    assert len(manifest["checkpoints"]) == 3


def test_initialisers_have_timms_parameter_names(fleet: Path) -> None:
    import onnx

    graph = onnx.load(fleet).graph
    names = {initializer.name for initializer in graph.initializer}
    assert {"cls_token", "pos_embed", "bank", "heads"} <= names
    folded = "rlrr" in str(fleet)  # a folded graph stores these weights under other names
    assert folded or {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= names
    assert [value.name for value in graph.input] == ["pixel_values", "task"]


@pytest.mark.parametrize(
    ("method", "form", "expected"),
    [
        ("aoft-lora-star", "auto", "mixed"),
        ("rlrr", "auto", "folded"),
        ("rlrr", "mixed", "mixed"),
        ("lora", "folded", "folded"),
    ],
)
def test_the_form_of_a_fleet_is_in_its_metadata_and_manifest(
    method: str,
    form: str,
    expected: str,
    make_task: Callable[..., Path],
    backbone_weights: Path,
    tmp_path: Path,
) -> None:
    tasks = [make_task(tmp_path, n, method, seed=i) for i, n in enumerate(CLASSES)]
    exported = export_fleet(
        tasks, tmp_path / "f.onnx", form=form, backbone=BackboneSource(weights=backbone_weights)
    )
    assert exporter.load(exported.path).info["form"] == expected
    assert json.loads(exported.manifest.read_text("utf-8"))["form"] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "fast"}, "Unknown form of fleet 'fast'"),
        ({"form": "folded", "precision": "int8"}, "cannot be folded into weights of int8"),
    ],
)
def test_an_unsupported_form_is_refused(
    options: dict[str, Any],
    message: str,
    make_task: Callable[..., Path],
    backbone_weights: Path,
    tmp_path: Path,
) -> None:
    picture = tmp_path / "a.png"
    Image.fromarray(np.full((20, 20, 3), 90, np.uint8)).save(picture)
    task = make_task(tmp_path, "one", "rlrr")
    with pytest.raises(AoftError, match=message):
        export_fleet(
            [task],
            tmp_path / "f.onnx",
            backbone=BackboneSource(weights=backbone_weights),
            verify=VerifyOptions(images=[picture]),
            **options,
        )


def test_a_model_that_cannot_be_mixed_becomes_a_folded_fleet(tmp_path: Path) -> None:
    name = "beit_base_patch16_224"
    small: dict[str, Any] = {"img_size": 32, "depth": 1}
    weights, tasks = (
        tmp_path / "weights.safetensors",
        [tmp_path / "one.ckpt", tmp_path / "two.ckpt"],
    )
    save_file(timm.create_model(name, num_classes=1, **small).state_dict(), weights)
    half = (0.5, 0.5, 0.5)
    for seed, path in enumerate(tasks):
        model, identity = create_backbone(name, num_classes=2, weights=weights, **small)
        tuned = attach(model, "aoft-lora", backbone=identity, seed=seed)
        save(tuned, path, classes=("a", "b"), preprocessing=Preprocessing(32, 1.0, half, half))
    exported = export_fleet(tasks, tmp_path / "f.onnx", backbone=BackboneSource(weights=weights))
    assert exporter.load(exported.path).info["form"] == "folded"
    assert exported.report.agreement == 1.0
    with pytest.raises(AttachError, match="read by its parent"):
        export_fleet(
            tasks, tmp_path / "g.onnx", form="mixed", backbone=BackboneSource(weights=weights)
        )


def test_aoft_predict_needs_a_task_and_uses_its_classes(
    fleet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    picture = tmp_path / "a.png"
    Image.fromarray(np.full((20, 20, 3), 90, np.uint8)).save(picture)
    assert predict([str(fleet), str(picture), "--task", "dogs", "--top", "3", "--json"]) == 0
    classes = json.loads(capsys.readouterr().out)["classes"]
    assert {c["label"] for c in classes} == set(CLASSES["dogs"])
    assert sum(c["probability"] for c in classes) == pytest.approx(1, abs=1e-5)
    assert "is a fleet of 3 tasks: name one with --task" in refused(predict, fleet, picture)
    assert "Unknown task 'dog'. Did you mean dogs?" in refused(
        predict, fleet, picture, "--task", "dog"
    )


def test_an_artefact_of_a_single_task_takes_no_task(artefact: Path) -> None:
    with pytest.raises(SettingError, match="holds a single task: leave `task` out"):
        load_classifier(artefact, "cats")
    with pytest.raises(SettingError, match="holds a single task"):
        exporter.load(artefact).run(np.zeros((1, 3, 16, 16), np.float32), np.array([0]))


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (None, "needs a task for each image"),
        ([0], r"Tasks \[0\] for 2 images: give one from 0 to 2"),
        ([0, 3], r"Tasks \[0, 3\] for 2 images"),
        ([-1, 0], r"Tasks \[-1, 0\] for 2 images"),
    ],
)
def test_invalid_task_indices_are_refused(
    fleet: Path, tasks: list[int] | None, message: str
) -> None:
    given = None if tasks is None else np.array(tasks)
    with pytest.raises(SettingError, match=message):
        exporter.load(fleet).run(np.zeros((2, 3, 16, 16), np.float32), given)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"method": "lora"}, "differ in their method, so"),
        ({"method": "rlrr", "rank": 2}, "differ in their settings, so"),
        ({"method": "rlrr", "size": 17}, "differ in their preprocessing, so"),
    ],
)
def test_tasks_that_cannot_share_a_graph_are_refused(
    second: dict[str, Any],
    message: str,
    make_task: Callable[..., Path],
    tmp_path: Path,
    backbone_weights: Path,
    refused: Callable[..., str],
) -> None:
    tasks = [make_task(tmp_path, "one", "rlrr"), make_task(tmp_path, "two", **second)]
    options = ["--backbone-weights", backbone_weights, "-o", tmp_path / "f.onnx"]
    assert message in refused(main, "--fleet", *tasks, *options)


def test_two_tasks_with_the_same_name_are_refused(
    make_task: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    task = make_task(tmp_path, "one", "rlrr")
    line = refused(main, "--fleet", task, task, "-o", tmp_path / "f.onnx")
    assert line.startswith("Two tasks are called 'one'")


def test_full_fine_tuning_is_refused(
    make_task: Callable[..., Path],
    tmp_path: Path,
    backbone_weights: Path,
    refused: Callable[..., str],
) -> None:
    options = ["--backbone-weights", backbone_weights, "-o", tmp_path / "f.onnx"]
    line = refused(main, "--fleet", make_task(tmp_path, "one", "full"), *options)
    assert "full changes every weight" in line


@pytest.mark.parametrize("option", [["--uint8"], ["--backbone", "x"]])
def test_options_of_merge_are_refused_for_a_fleet(option: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--fleet", "a.ckpt", *option])
    assert ended.value.code == 2


def test_an_exporter_without_support_for_fleets_is_refused(
    make_task: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    line = refused(main, "--fleet", make_task(tmp_path, "one", "rlrr"), "--to", "timm")
    assert "timm writes no fleets: choose onnx or openvino" in line


class FirstTaskOnly:
    """An engine that answers every image with the first task."""

    info: Mapping[str, str] = MappingProxyType({})
    takes_pixels, takes_tasks, device = False, True, "cpu"

    def run(self, images: Any, task: Any = None) -> Any:
        return np.repeat(images[:, :1], 2, 1) * 1.0


def test_a_fleet_that_ignores_the_task_fails_verification() -> None:
    inputs = np.arange(7, dtype=np.float32)[:, None]
    expected = [np.repeat(inputs, 2, 1), np.repeat(inputs, 2, 1) + 1]
    two = [Classes("ab")] * 2
    sizes = (1, 8, 32), BATCH_SIZES
    with pytest.raises(VerificationError, match=r"task 1's logits differ .* by 1\.00e"):
        _verified(FirstTaskOnly(), inputs, expected, two, Bar(5e-5), *sizes)
    with pytest.raises(VerificationError, match="not finite"):
        _verified(
            FirstTaskOnly(), inputs, [inputs * np.nan], two, Bar(5e-5), (1, 8, 32), BATCH_SIZES
        )
    report = _verified(
        FirstTaskOnly(), inputs, expected[:1], two, Bar(5e-5), (1, 8, 32), BATCH_SIZES
    )
    assert report.agreement == 1.0
