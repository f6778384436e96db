from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef

from aoft_deploy.artefacts.engine import EngineOptions
from aoft_deploy.artefacts.manifest import manifest_path, read_manifest
from aoft_deploy.artefacts.prediction import load_classifier
from aoft_deploy.artefacts.registry import exporter_names, get_exporter
from aoft_deploy.artefacts.verification import Report, verify
from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.checkpoints.checkpoint import read_checkpoint, save
from aoft_deploy.checkpoints.opening import load, open_checkpoint
from aoft_deploy.cli.export import main
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import CheckpointError, OutputError, SettingError, UnknownNameError
from aoft_deploy.export.merged import export_merged
from aoft_deploy.tuning.attaching import attach
from aoft_deploy.tuning.backbones import weights_file
from aoft_deploy.tuning.backbones.backbone import create_backbone
from aoft_deploy.tuning.backbones.state_dict import read_state_dict
from aoft_deploy.tuning.methods import get_method
from aoft_deploy.tuning.tuned_model import TunedModel
from aoft_exporters.onnx import exporter as onnx_exporter


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def manifest(artefact: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(manifest_path(artefact).read_text("utf-8"))
    return values


def test_the_manifest_is_beside_the_artefact() -> None:
    assert manifest_path(Path("a/model.v2.onnx")) == Path("a/model.v2.onnx.json")


def test_the_manifest_holds_the_hashes_and_sizes_of_the_files(
    manifest: dict[str, Any], artefact: Path, checkpoint: Path
) -> None:
    assert manifest["artefact"] == artefact.name
    assert manifest["sha256"] == digest(artefact)
    assert manifest["bytes"] == artefact.stat().st_size
    assert manifest["checkpoint"] == {"name": "model.ckpt", "sha256": digest(checkpoint)}
    assert manifest["backbone"]["digest"] == read_checkpoint(checkpoint).backbone.digest


def test_the_manifest_describes_the_task(
    manifest: dict[str, Any], classes: tuple[str, ...], backbone_args: dict[str, Any]
) -> None:
    assert manifest["method"] == "rlrr"
    assert manifest["settings"] == get_method("rlrr").settings({})
    assert manifest["classes"] == list(classes)
    assert manifest["backbone"]["args"] == backbone_args
    assert manifest["input"] == {
        "name": "pixel_values",
        "type": "float32",
        "shape": ["batch", 3, 16, 16],
    }
    assert manifest["forced"] is False
    assert torch.__version__.startswith(manifest["versions"]["torch"])


def test_the_manifest_holds_the_verification_on_built_in_and_real_images(
    manifest: dict[str, Any], photos: list[Path]
) -> None:
    report = manifest["verification"]
    assert report["images"] == 7 + len(photos)
    assert report["real_images"] == len(photos)
    assert report["batch_sizes"] == [1, 2, 7]
    assert 0 < report["max_abs"] < report["tolerance"]
    assert report["agreement"] == 1.0


def test_the_manifest_holds_the_command_that_repeats_the_export(
    manifest: dict[str, Any], artefact: Path, checkpoint: Path
) -> None:
    assert manifest["command"].startswith(f"aoft-export --merge {checkpoint} ")
    assert f"-o {artefact} " in manifest["command"]


def test_the_manifest_of_a_pixel_artefact_has_a_uint8_input(pixel_artefact: Path) -> None:
    manifest = json.loads(manifest_path(pixel_artefact).read_text("utf-8"))
    assert manifest["input"] == {
        "name": "image",
        "type": "uint8",
        "shape": ["batch", 16, 16, 3],
    }


def test_the_manifest_is_utf_8(artefact: Path) -> None:
    assert "日本" in manifest_path(artefact).read_bytes().decode("utf-8")


def test_artefact_and_manifest_have_default_permissions(artefact: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    default = (tmp_path / "plain").stat().st_mode
    assert artefact.stat().st_mode == default
    assert manifest_path(artefact).stat().st_mode == default


def test_the_default_output_is_beside_the_checkpoint(
    make_checkpoint: Callable[..., Path], backbone_weights: Path
) -> None:
    checkpoint = make_checkpoint("linear")
    exported = export_merged(
        checkpoint, to="timm", backbone=BackboneSource(weights=backbone_weights)
    )
    assert exported.path == checkpoint.with_name("model.safetensors")
    assert exported.manifest == checkpoint.with_name("model.safetensors.json")
    assert exported.size == exported.path.stat().st_size
    names = {path.name for path in checkpoint.parent.iterdir()}
    assert names == {"model.ckpt", "model.safetensors", "model.safetensors.json"}


def test_a_second_export_gives_the_same_artefact_and_needs_overwrite(
    checkpoint: Path, backbone_weights: Path, tmp_path: Path
) -> None:
    output = tmp_path / "deep" / "er" / "a.safetensors"
    backbone = BackboneSource(weights=backbone_weights)
    first = export_merged(checkpoint, output, to="timm", backbone=backbone)
    tensors = {name: tensor.clone() for name, tensor in load_file(output).items()}
    output.write_bytes(b"something else")
    with pytest.raises(OutputError, match=r"exists: give another `output`, or .*overwrite=True"):
        export_merged(checkpoint, output, to="timm", backbone=backbone)
    assert output.read_bytes() == b"something else"
    second = export_merged(checkpoint, output, to="timm", backbone=backbone, overwrite=True)
    again = load_file(output)
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    assert first.report == second.report
    assert len(list(output.parent.iterdir())) == 2


def test_several_checkpoints_share_their_backbone_and_give_the_same_artefacts(
    make_checkpoint: Callable[..., Path],
    backbone_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = [tmp_path / f"{name}.ckpt" for name in "abc"]
    for path, method in zip(paths, ("rlrr", "aoft-lora-star", "rlrr"), strict=True):
        path.write_bytes(make_checkpoint(method).read_bytes())
    alone = [
        export_merged(
            path,
            tmp_path / f"alone-{path.stem}.onnx",
            backbone=BackboneSource(weights=backbone_weights),
        ).path.read_bytes()
        for path in paths
    ]
    read = list[Path]()

    def reading(path: Path) -> Any:
        read.append(path)
        return read_state_dict(path)

    monkeypatch.setattr(weights_file, "read_state_dict", reading)
    options = ["--merge", *paths, "--backbone-weights", backbone_weights]
    assert main(list(map(str, options))) == 0
    assert read == [backbone_weights]
    assert [path.with_suffix(".onnx").read_bytes() for path in paths] == alone
    assert capsys.readouterr().out.count("verified on 2 images at batch size 2") == 2


def test_several_checkpoints_are_checked_before_the_first_is_exported(
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    one, other = tmp_path / "one.ckpt", tmp_path / "other.ckpt"
    for path in (one, other):
        path.write_bytes(make_checkpoint("rlrr").read_bytes())
    line = refused(main, "--merge", one, other, one)
    assert line == f"{one.with_suffix('.onnx')} would be written twice: give each checkpoint once."
    other.with_suffix(".onnx").touch()
    assert "other.onnx exists" in refused(main, "--merge", one, other)
    assert "There is no file" in refused(main, "--merge", one, tmp_path / "none.ckpt")
    assert not one.with_suffix(".onnx").exists()
    for option, message in (("--output", "--output goes with"), ("--to", "--to auto goes with")):
        with pytest.raises(SystemExit, match="2"):
            main(["--merge", str(one), str(other), option, "auto"])
        assert f"error: {message} one checkpoint" in capsys.readouterr().err


def test_a_file_that_appears_during_the_export_is_not_replaced(
    checkpoint: Path, backbone_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "a.safetensors"

    def verify_slowly(*given: Any, **options: Any) -> Report:
        output.write_text("precious")
        return verify(*given, **options)

    monkeypatch.setattr("aoft_deploy.export.merged.verify", verify_slowly)
    with pytest.raises(OutputError, match=r"a\.safetensors exists"):
        export_merged(
            checkpoint, output, to="timm", backbone=BackboneSource(weights=backbone_weights)
        )
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
    assert output.read_text() == "precious"


def test_the_folder_of_a_run_stands_for_its_checkpoint(
    checkpoint: Path, backbone_weights: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "model.ckpt").write_bytes(checkpoint.read_bytes())
    exported = export_merged(run, to="timm", backbone=BackboneSource(weights=backbone_weights))
    assert exported.path == run / "model.safetensors"
    assert json.loads(exported.manifest.read_text())["checkpoint"]["name"] == "model.ckpt"


def test_the_artefact_gives_the_logits_of_the_trained_model(
    checkpoint: Path, backbone_weights: Path, artefact: Path, make_tuned: Callable[..., TunedModel]
) -> None:
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        loaded = load(checkpoint, weights=backbone_weights)(x)
        trained = make_tuned("rlrr")(x)
    assert torch.equal(loaded, trained)
    answers = onnx_exporter.load(artefact).run(x.numpy())
    np.testing.assert_allclose(answers, trained.numpy(), atol=5e-5, rtol=0)


def test_an_unknown_exporter_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean onnx"):
        export_merged(tmp_path / "missing.ckpt", to="onx")


def test_uint8_is_refused_by_an_exporter_without_a_graph(
    checkpoint: Path, backbone_weights: Path, tmp_path: Path
) -> None:
    output = tmp_path / "a.safetensors"
    with pytest.raises(SettingError, match="`uint8` needs a graph"):
        export_merged(
            checkpoint,
            output,
            to="timm",
            uint8=True,
            backbone=BackboneSource(weights=backbone_weights),
        )
    assert list(tmp_path.iterdir()) == []


def test_an_output_without_the_exporters_suffix_is_refused(
    checkpoint: Path, tmp_path: Path
) -> None:
    for name in ("a", "a.bin", "a.onnx.old"):
        with pytest.raises(OutputError, match=f"{name} does not end in .onnx"):
            export_merged(checkpoint, tmp_path / name)


def test_no_input_is_overwritten(
    checkpoint: Path, backbone_weights: Path, photos: list[Path], tmp_path: Path
) -> None:
    task = tmp_path / "task.safetensors"
    task.write_bytes(checkpoint.read_bytes())
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(backbone_weights.read_bytes())
    (tmp_path / "link.safetensors").symlink_to(weights)
    for output in (None, task, weights, tmp_path / "link.safetensors"):
        with pytest.raises(OutputError, match="is an input of this export"):
            export_merged(task, output, to="timm", backbone=BackboneSource(weights=weights))
    before = digest(weights)
    export_merged(
        task, tmp_path / "new.safetensors", to="timm", backbone=BackboneSource(weights=weights)
    )
    assert digest(weights) == before


def test_a_manifest_path_that_is_a_folder_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "a.onnx.json").mkdir()
    with pytest.raises(OutputError, match=r"a\.onnx\.json exists and is no file"):
        export_merged(checkpoint, tmp_path / "a.onnx")


def test_images_of_another_size_than_the_backbones_are_refused(
    checkpoint: Path, backbone_weights: Path, with_metadata: Callable[..., Path], tmp_path: Path
) -> None:
    path = with_metadata(
        checkpoint, tmp_path / "a.ckpt", lambda data: data["preprocessing"].update(size=32)
    )
    with pytest.raises(CheckpointError, match=r"prepares images of 32 pixels, but .* takes 16"):
        open_checkpoint(path, BackboneSource(weights=backbone_weights))


@pytest.fixture(scope="module")
def one_output(
    backbone_weights: Path,
    backbone_name: str,
    with_metadata: Callable[..., Path],
    tmp_path_factory: Any,
) -> Path:
    """A checkpoint with a single logit that does not say what it means, as old files."""
    model, identity = create_backbone(
        backbone_name,
        num_classes=1,
        weights=backbone_weights,
        img_size=16,
        depth=1,
        embed_dim=32,
        num_heads=2,
    )
    tuned = attach(model, "aoft-lora-star", seed=0, backbone=identity)
    path: Path = tmp_path_factory.mktemp("one") / "age.ckpt"
    half = (0.5, 0.5, 0.5)
    preprocessing = Preprocessing(16, crop_pct=0.9, mean=half, std=half)
    save(tuned, path, classes=("years",), preprocessing=preprocessing, activation="none")
    return with_metadata(path, path, lambda metadata: metadata.pop("activation"))


@pytest.mark.parametrize("to", exporter_names())
def test_a_softmax_of_one_output_is_refused_by_name_by_every_exporter(
    to: str, one_output: Path, backbone_weights: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    suffix = get_exporter(to).suffix
    options: list[Any] = ["--merge", one_output, "--backbone-weights", backbone_weights, "--to", to]
    line = refused(main, *options, "-o", tmp_path / f"a{suffix}")
    assert line == (
        f"{one_output} has 1 output ('years'), whose softmax is always 1: save its checkpoint with "
        'activation="sigmoid" if it means yes or no, or with activation="none" if it is a value, '
        "or train it with a class for each answer."
    )


@pytest.mark.parametrize("to", ["onnx", "openvino", "peft", "timm", "triton"])
def test_one_output_is_exported_and_answers_once_its_meaning_is_stated(
    to: str, one_output: Path, backbone_weights: Path, photos: list[Path], tmp_path: Path
) -> None:
    tuned = load(one_output, weights=str(backbone_weights))
    save(tuned, tmp_path / "ripe.ckpt", activation="sigmoid")
    output = tmp_path / f"a{get_exporter(to).suffix}"
    source = BackboneSource(weights=backbone_weights)
    export_merged(str(tmp_path / "ripe.ckpt"), output, to=to, backbone=source)
    assert read_manifest(manifest_path(output))["activation"] == "sigmoid"
    if to == "peft":  # its backbone is not timm's
        assert load(output, weights=backbone_weights).predict(photos) == tuned.predict(photos)
        return
    if to == "triton":
        text = '{\n  key: "activation"\n  value {\n    string_value: "sigmoid"'
        assert text in (output / "config.pbtxt").read_text("utf-8")
    for found, wanted in zip(
        load_classifier(output).predict(photos, 1), tuned.predict(photos, 1), strict=True
    ):
        assert found[0].label == "years"
        assert found[0][1] == pytest.approx(wanted[0][1], abs=1e-5)


def test_a_fleet_with_a_task_of_one_output_is_refused_by_name(
    one_output: Path,
    make_checkpoint: Callable[..., Path],
    backbone_weights: Path,
    refused: Callable[..., str],
    tmp_path: Path,
) -> None:
    other = make_checkpoint("aoft-lora-star")
    options: list[Any] = ["--backbone-weights", backbone_weights, "-o", tmp_path / "fleet.onnx"]
    for tasks in ([other, one_output], [one_output, other]):
        line = refused(main, "--fleet", *tasks, *options)
        assert line.startswith(f"{one_output} has 1 output ('years'), whose softmax is always 1")


def test_the_model_is_freed_before_the_artefact_is_opened(
    checkpoint: Path,
    backbone_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also after a new trace, although torch and onnxscript keep what they traced last."""
    monkeypatch.setenv("AOFT_CACHE_DIR", str(tmp_path / "cache"))
    exporter, alive, count = get_exporter("onnx"), list[Any](), list[int]()
    before, weak = backbone_weights.read_bytes(), cast(Any, StorageWeakRef)

    def export(model: Any, path: Path, spec: Any) -> None:
        alive.extend(weak(each.untyped_storage()) for each in model.parameters())
        exporter.export(model, path, spec)

    def load(path: Path, options: EngineOptions) -> Any:
        count.append(sum(not each.expired() for each in alive))
        return exporter.load(path, options)

    watched = replace(exporter, export=export, load=load)
    monkeypatch.setattr("aoft_deploy.export.merged.get_exporter", lambda name: watched)
    export_merged(
        checkpoint, tmp_path / "a.onnx", backbone=BackboneSource(weights=backbone_weights)
    )
    assert len(alive) > 10
    assert count == [0]
    assert backbone_weights.read_bytes() == before
