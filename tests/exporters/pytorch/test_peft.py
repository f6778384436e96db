"""Export of updates to PEFT LoRA folders, read by PEFT and by our reader."""

from __future__ import annotations

import hashlib
import importlib
import json
import resource
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from specs import export_spec
from torch import nn

from aoft_deploy.artefacts.prediction import load_classifier
from aoft_deploy.artefacts.registry import load_artefact
from aoft_deploy.artefacts.spec import ExportSpec
from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.checkpoints.checkpoint import save
from aoft_deploy.checkpoints.opening import open_checkpoint
from aoft_deploy.cli.export import main
from aoft_deploy.cli.inspect import describe
from aoft_deploy.cli.inspect import main as inspect_main
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import ArtefactError, CheckpointError, OutputError, SettingError
from aoft_deploy.export.merged import export_merged
from aoft_deploy.tuning.attaching import attach
from aoft_deploy.tuning.backbones.backbone import create_backbone
from aoft_deploy.tuning.merging import merge
from aoft_deploy.tuning.tuned_model import TunedModel
from aoft_exporters.pytorch import peft_exporter as exporter

HALF = (0.5, 0.5, 0.5)
X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("aoft-lora", {}),
    ("aoft-lora", {"strict": True, "scale": 0.5}),
    ("aoft-lora-star", {}),
    ("aoft-lora-star", {"strict": True, "rank": 3, "scale": 2.0}),
    ("aoft-lora-star", {"targets": ["k", "proj", "fc1", "fc2"]}),
    ("aoft-lora-star", {"targets": ["qkv"], "rank": 32}),
    ("aoft-lora-star", {"rank": 20}),  # 40 in total, more than the width of 32
    ("lora", {"scale": 1.5}),
    ("lora", {"targets": ["q", "k", "v"], "rank": 1}),
    ("lora", {"targets": ["v"]}),
    ("lora", {"ranks": {"blocks.0.attn.qkv.q": 3, "blocks.0.mlp.fc2": 7}}),
]
REFUSED = "rlrr ssf bitfit adapter vpt full linear aoft-adapter aoft-adapter-star aoft-vpt".split()


@pytest.fixture(scope="session")
def peft() -> Any:
    return importlib.import_module("peft")


@pytest.fixture
def plain_model(
    backbone_name: str, backbone_args: dict[str, Any], backbone_weights: Path
) -> nn.Module:
    """The backbone as timm makes it, with a new classifier."""
    model: nn.Module = timm.create_model(backbone_name, num_classes=5, **backbone_args)
    model.load_state_dict(load_file(backbone_weights), strict=False)
    return model.eval()


def export(checkpoint: Path, weights: Path, *more: object) -> Path:
    """Export a checkpoint with the command and return the folder."""
    options = ["--merge", checkpoint, "--backbone-weights", weights, "--to", "peft", *more]
    assert main([str(option) for option in options]) == 0
    return checkpoint.with_suffix(".peft")


@pytest.fixture(scope="module")
def folder(make_checkpoint: Callable[..., Path], backbone_weights: Path) -> Path:
    return export(make_checkpoint("aoft-lora-star"), backbone_weights)


@pytest.mark.parametrize(("method", "settings"), METHODS, ids=str)
def test_peft_on_a_plain_timm_model_gives_the_unmerged_logits(
    method: str,
    settings: dict[str, Any],
    peft: Any,
    make_checkpoint: Callable[..., Path],
    make_tuned: Callable[..., TunedModel],
    backbone_weights: Path,
    plain_model: nn.Module,
) -> None:
    folder = export(make_checkpoint(method, **settings), backbone_weights)
    with torch.inference_mode():
        expected, unchanged = make_tuned(method, **settings)(X), plain_model(X)
    adapted = peft.PeftModel.from_pretrained(plain_model, folder).eval()
    with torch.inference_mode():
        logits = adapted(X)
        merged = adapted.merge_and_unload()(X)
    assert (expected - unchanged).abs().max() > 0.1
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("method", "settings"), METHODS, ids=str)
def test_our_own_reader_gives_the_unmerged_logits(
    method: str,
    settings: dict[str, Any],
    make_checkpoint: Callable[..., Path],
    make_tuned: Callable[..., TunedModel],
    backbone_weights: Path,
    classes: tuple[str, ...],
) -> None:
    folder = export(make_checkpoint(method, **settings), backbone_weights)
    tuned, task = open_checkpoint(folder, BackboneSource(weights=backbone_weights))
    assert (tuned.method, task.method, task.classes) == ("lora", "lora", classes)
    with torch.inference_mode():
        expected = make_tuned(method, **settings)(X)
        torch.testing.assert_close(tuned(X), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(merge(tuned)(X), expected, atol=1e-5, rtol=0)


def test_a_round_trip_through_peft_gives_the_same_tensors_and_logits(
    folder: Path, backbone_weights: Path, make_tuned: Callable[..., TunedModel], tmp_path: Path
) -> None:
    options = ["--merge", folder, "--backbone-weights", backbone_weights]
    again, last = tmp_path / "again", tmp_path / "last.onnx"
    assert main([*map(str, options), "--to", "peft", "-o", str(again)]) == 0
    first, second = (load_file(path / "adapter_model.safetensors") for path in (folder, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    options = ["--merge", again, "--backbone-weights", backbone_weights, "-o", last]
    assert main([str(option) for option in options]) == 0
    with torch.inference_mode():
        expected = make_tuned("aoft-lora-star")(X).numpy()
    np.testing.assert_allclose(load_artefact(last).run(X.numpy()), expected, atol=1e-5, rtol=0)
    classes = json.loads(load_artefact(last).info["classes"])
    assert classes == describe(folder)["classes"]


def test_q_and_v_share_one_block_wise_pair_in_the_fused_layer(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    prefix = "base_model.model."
    assert shapes == {
        f"{prefix}blocks.0.attn.qkv.lora_A.weight": (16, 32),
        f"{prefix}blocks.0.attn.qkv.lora_B.weight": (96, 16),
        f"{prefix}head.weight": (5, 32),
        f"{prefix}head.bias": (5,),
    }
    b = tensors[f"{prefix}blocks.0.attn.qkv.lora_B.weight"]
    assert b[:32, :8].any()
    assert b[64:, 8:].any()
    assert not b[32:64].any()
    assert not b[:32, 8:].any()
    assert not b[64:, :8].any()


def test_every_field_of_the_config_is_one_of_pefts(folder: Path, peft: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    assert set(config) <= {field.name for field in fields(peft.LoraConfig)}
    assert config["r"] == config["lora_alpha"] == 16
    assert config["target_modules"] == ["blocks.0.attn.qkv"]
    assert config["modules_to_save"] == ["head"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}


def test_the_folder_holds_two_files_with_the_task_in_the_tensors_metadata(
    folder: Path, classes: tuple[str, ...]
) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        metadata = file.metadata()
    task = json.loads(metadata["aoft"])
    assert metadata["format"] == "pt"
    assert task["classes"] == list(classes)
    assert task["method"] == "aoft-lora-star"


def test_the_manifest_stands_beside_the_folder_and_holds_its_digest(folder: Path) -> None:
    manifest = json.loads(folder.with_name("model.peft.json").read_text("utf-8"))
    names = sorted(path.name for path in folder.iterdir())
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    listed = "".join(f"{digests[name]}  {name}\n" for name in names)  # as sha256sum prints
    assert manifest["artefact"] == "model.peft"
    assert manifest["sha256"] == hashlib.sha256(listed.encode()).hexdigest()
    assert manifest["bytes"] == sum((folder / name).stat().st_size for name in names)
    assert manifest["verification"]["max_abs"] <= 1e-5
    assert manifest["verification"]["agreement"] == 1.0


def test_the_manifest_of_an_export_from_a_folder_holds_the_folders_digest(
    folder: Path, backbone_weights: Path, tmp_path: Path
) -> None:
    exported = export_merged(
        folder, tmp_path / "a.onnx", backbone=BackboneSource(weights=backbone_weights)
    )
    manifest = json.loads(exported.manifest.read_text("utf-8"))
    assert manifest["checkpoint"] == {
        "name": "model.peft",
        "sha256": describe(folder)["sha256"],
    }


def test_inspect_describes_the_folder(
    folder: Path, classes: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    found = describe(folder)
    assert found["kind"] == "PEFT LoRA folder"
    assert found["ranks"] == {"blocks.0.attn.qkv": 16}
    assert found["factors"] == {"blocks.0.attn.qkv": 1.0}
    assert found["classes"] == list(classes)
    assert found["sites"] == {"blocks.0.attn.qkv": 16 * (32 + 96), "classifier": 5 * 33}
    assert found["manifest"] == "matches"
    assert json.loads(json.dumps(found)) == found
    assert inspect_main([str(folder)]) == 0
    assert "PEFT LoRA folder" in capsys.readouterr().out


def test_inspect_reports_a_changed_folder(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "a"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert describe(copy)["manifest"] == "none"
    manifest = folder.with_name("model.peft.json").read_text("utf-8")
    (tmp_path / "a.json").write_text(manifest, "utf-8")
    assert describe(copy)["manifest"] == "matches"
    config = copy / "adapter_config.json"
    config.write_text(config.read_text("utf-8") + "\n", "utf-8")
    assert "was changed" in describe(copy)["manifest"]


@pytest.mark.parametrize("method", REFUSED)
def test_a_method_that_is_no_lora_is_refused(
    method: str,
    make_checkpoint: Callable[..., Path],
    backbone_weights: Path,
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    options = ["--backbone-weights", backbone_weights, "--to", "peft", "-o", tmp_path / "a"]
    line = refused(main, "--merge", make_checkpoint(method), *options)
    assert line.startswith(method)
    assert "be written as LoRA" in line
    assert line.endswith("export with --to onnx.")


def test_pixels_as_input_are_refused(
    make_checkpoint: Callable[..., Path],
    backbone_weights: Path,
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    options = ["--merge", make_checkpoint("lora"), "--backbone-weights", backbone_weights]
    line = refused(main, *options, "--to", "peft", "--uint8", "-o", tmp_path / "a")
    assert "--uint8 needs a graph: export to onnx with --to" in line


def small(name: str, **args: Any) -> nn.Module:
    size = {"img_size": 32, "num_classes": 3, "pretrained": False}
    model: nn.Module = timm.create_model(name, **{**size, **args})
    return model


BEIT: dict[str, Any] = {"embed_dim": 32, "depth": 1, "num_heads": 2}
SWIN: dict[str, Any] = {
    "img_size": 64,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 8,
    "depths": (1, 1),
    "num_heads": (1, 2),
}


def spec(model: nn.Module, size: int) -> ExportSpec:
    preprocessing = Preprocessing(size, crop_pct=0.9, mean=HALF, std=HALF)
    texts = {"classes": '["a", "b", "c"]', "preprocessing": json.dumps(preprocessing.to_dict())}
    return export_spec(size, False, HALF, HALF, texts)


def test_a_layer_that_timm_does_not_call_is_refused_because_peft_would_ignore_it(
    tmp_path: Path, peft: Any
) -> None:
    tuned = attach(small("beit_base_patch16_224", **BEIT), "aoft-lora")
    model = small("beit_base_patch16_224", **BEIT).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        before = model(x)
        config = peft.LoraConfig(target_modules=["qkv"], init_lora_weights=False)
        adapted = peft.get_peft_model(model, config)
        assert torch.equal(adapted(x), before)  # PEFT ignores it silently
        assert not torch.equal(adapted.merge_and_unload()(x), before)
    with pytest.raises(SettingError, match=r"Beit reads the weight of blocks\.0\.attn\.qkv with"):
        exporter.export(tuned, tmp_path / "a", spec(tuned, 32))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "args", "targets"),
    [
        ("beit_base_patch16_224", BEIT, ["proj", "fc1"]),
        ("swin_tiny_patch4_window7_224", SWIN, ["q", "v", "reduction"]),
        ("deit_tiny_distilled_patch16_224", BEIT, ["q", "v"]),
    ],
)
@torch.no_grad()
def test_other_models_round_trip_through_peft(
    name: str, args: dict[str, Any], targets: list[str], tmp_path: Path, peft: Any
) -> None:
    model = small(name, **args).eval()
    plain = small(name, **args).eval()
    plain.load_state_dict(model.state_dict())
    size = args.get("img_size", 32)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    before = plain(x)
    tuned = attach(model, "aoft-lora-star", rank=3, targets=targets).eval()
    for parameter in tuned.trained().values():
        parameter.add_(0.2 * torch.randn_like(parameter))
    exporter.export(tuned, tmp_path / "a", spec(tuned, size))
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "a").eval()
    assert (tuned(x) - before).abs().max() > 0.01
    torch.testing.assert_close(adapted(x), tuned(x), atol=1e-5, rtol=0)


def test_a_convolution_is_refused(tmp_path: Path) -> None:
    tuned = attach(small("resnet10t", img_size=None), "aoft-lora", rank=2)
    with pytest.raises(SettingError, match=r"conv\S* is a Conv2d, where LoRA has another form"):
        exporter.export(tuned, tmp_path / "a", spec(tuned, 32))


def test_an_existing_folder_is_refused_unless_it_is_empty(
    make_checkpoint: Callable[..., Path],
    backbone_weights: Path,
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    checkpoint = make_checkpoint("lora")
    options = ["--merge", checkpoint, "--backbone-weights", backbone_weights, "--to", "peft"]
    full, file, empty = tmp_path / "full", tmp_path / "file", tmp_path / "empty"
    full.mkdir()
    empty.mkdir()
    (full / "thesis.txt").write_text("years of work")
    file.write_text("too")
    (tmp_path / "link").symlink_to(empty)
    for existing in (full, file):
        line = refused(main, *options, "-o", existing)
        assert f"{existing} exists and is no peft artefact with a manifest: give another" in line
    for odd in (tmp_path / "link", tmp_path / "empty" / ".."):
        assert "cannot become a folder" in refused(main, *options, "-o", odd)
    assert main([*map(str, options), "-o", str(empty)]) == 0
    assert (empty / "adapter_config.json").is_file()
    assert (tmp_path / "empty.json").is_file()


def test_a_folder_with_the_manifests_name_is_refused(
    make_checkpoint: Callable[..., Path],
    backbone_weights: Path,
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    (tmp_path / "a.json").mkdir()
    options = ["--merge", make_checkpoint("lora"), "--backbone-weights", backbone_weights]
    line = refused(main, *options, "--to", "peft", "-o", tmp_path / "a")
    assert "a.json exists and is no file: give another name with --output" in line


def test_a_folder_that_cannot_be_written_is_refused(
    make_tuned: Callable[..., TunedModel], tmp_path: Path
) -> None:
    tuned = make_tuned("lora")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (2048, limits[1])
    )  # the config fits, the weights do not
    try:
        with pytest.raises(OutputError, match="a could not be written"):
            exporter.export(tuned, tmp_path / "a", spec(tuned, 16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_folder_on_weights_from_a_file_needs_the_file(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="give them with `weights`"):
        load_artefact(folder)


@pytest.mark.parametrize("name", ["", "adapters", "missing.peft"])
def test_a_folder_without_adapter_is_no_artefact(name: str, tmp_path: Path) -> None:
    error = CheckpointError if name.endswith(".peft") else ArtefactError
    with pytest.raises(error, match=r"(is an empty folder|There is no file)"):
        load_artefact(tmp_path / name)


def test_a_folder_on_timms_weights_runs_without_a_file(
    tmp_path: Path, make_picture: Callable[..., Any]
) -> None:
    model, identity = create_backbone("aoft_vit_nano", num_classes=3)
    tuned = attach(model, "aoft-lora", backbone=identity).eval()
    preprocessing = Preprocessing(64, crop_pct=1.0, mean=HALF, std=HALF)
    save(tuned, tmp_path / "a.ckpt", classes=["x", "y", "z"], preprocessing=preprocessing)
    exported = export_merged(tmp_path / "a.ckpt", tmp_path / "any name", to="peft")
    classifier = load_classifier(exported.path)
    image = make_picture(80, 70, seed=3)
    with torch.inference_mode():
        expected = tuned(torch.from_numpy(preprocessing(image))[None]).softmax(1).numpy()
    np.testing.assert_allclose(classifier.scores([image]), expected, atol=1e-5)
    assert classifier.classes == ("x", "y", "z")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda task: "text", "is no JSON"),
        (lambda task: json.dumps({**task, "format": 99}), "has format 99"),
        (lambda task: json.dumps({**task, "classes": 3}), "lacks classes as list"),
        (
            lambda task: json.dumps({**task, "classes": ["a"]}),
            r"has shape \(5.*the model needs \(1",
        ),
        (lambda task: json.dumps({**task, "backbone": {}}), "names no backbone"),
    ],
)
def test_a_tampered_description_is_refused(
    change: Callable[[dict[str, Any]], str],
    message: str,
    folder: Path,
    backbone_weights: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        task = json.loads(file.metadata()["aoft"])
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"aoft": change(task)})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path, BackboneSource(weights=backbone_weights))


def test_the_folder_may_be_the_current_directory(
    folder: Path, backbone_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    exported = export_merged(
        Path("."), to="timm", backbone=BackboneSource(weights=backbone_weights)
    )
    assert exported.path == folder.with_name("model.safetensors")
    manifest = json.loads(exported.manifest.read_text("utf-8"))
    assert manifest["checkpoint"]["name"] == "model.peft"
