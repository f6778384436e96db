"""A path of a wrong kind is named, and the message says what to give instead."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from aoft_deploy.artefacts.registry import load_artefact
from aoft_deploy.checkpoints.checkpoint import read_checkpoint
from aoft_deploy.checkpoints.file_format import checkpoint_file
from aoft_deploy.checkpoints.inspection import describe_checkpoint
from aoft_deploy.checkpoints.names import task_name
from aoft_deploy.checkpoints.opening import load
from aoft_deploy.errors import ArtefactError, CheckpointError
from aoft_deploy.path_kinds import GIVE, described, missing


@pytest.fixture
def run(checkpoint: Path, tmp_path: Path) -> Path:
    """The folder of a training run."""
    folder = tmp_path / "my.run"
    folder.mkdir()
    shutil.copyfile(checkpoint, folder / "model.ckpt")
    (folder / "metrics.jsonl").write_text('{"epoch": 1, "lr": 0.1}\n{"epoch": 2, "lr": 0.1}\n')
    save_file({"now.a": torch.ones(1)}, folder / "resume.safetensors", {"aoft-run": "{}"})
    return folder


def test_the_folder_of_a_run_stands_for_its_checkpoint(
    run: Path, checkpoint: Path, backbone_weights: Path
) -> None:
    assert checkpoint_file(run) == run / "model.ckpt"
    assert checkpoint_file(str(checkpoint)) == checkpoint
    assert read_checkpoint(run).classes == read_checkpoint(checkpoint).classes
    assert load(run, weights=backbone_weights).method == "rlrr"
    assert describe_checkpoint(run) == describe_checkpoint(run / "model.ckpt")
    assert task_name(run) == task_name(run / "model.ckpt") == "my.run"


def test_a_folder_of_runs_lists_them_in_natural_order(run: Path, tmp_path: Path) -> None:
    for name in ("r10", "r2", "suite/task/seed-0"):
        shutil.copytree(run, tmp_path / "runs" / name)
    runs = [str(tmp_path / "runs" / name) for name in ("r2", "r10", "suite/task/seed-0")]
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path / "runs")
    expected = f"is a folder of 3 training runs: give one of {', '.join(runs)}."
    assert str(caught.value) == f"{tmp_path / 'runs'} {expected}"
    found = describe_checkpoint(tmp_path / "runs")
    assert found["kind"] == "folder of 3 training runs"
    assert list(found["runs"]) == ["r2", "r10", "suite/task/seed-0"]
    assert found["runs"]["r2"] == {"method": "rlrr", "backbone": "aoft_vit_nano", "classes": 5}
    advice = described(tmp_path / "runs", "artefact").partition(": ")[2]
    assert advice == f"export one first: aoft-export --merge {runs[0]}"
    shutil.rmtree(tmp_path / "runs" / "r10")
    shutil.rmtree(tmp_path / "runs" / "suite")
    assert described(tmp_path / "runs", "checkpoint").endswith(f"1 training run: give {runs[0]}")


def test_a_checkpoint_where_an_artefact_is_wanted_is_exported_first(
    run: Path, checkpoint: Path
) -> None:
    for path in (run, checkpoint):
        with pytest.raises(ArtefactError, match=f"export it first: aoft-export --merge {path}"):
            load_artefact(path)
    with pytest.raises(ArtefactError, match=r"There is no file .*my\.rum\. Did you mean .*my\.run"):
        load_artefact(run.with_name("my.rum"))


def test_parts_of_a_run_lead_to_the_run(run: Path) -> None:
    found = described(run / "metrics.jsonl", "checkpoint")
    assert found == f"is the metrics of a training run: give its folder, {run}"
    found = described(run / "resume.safetensors", "checkpoint")
    assert found.endswith(f"an unfinished training run: give its {run / 'model.ckpt'}")
    (run / "model.ckpt").unlink()
    found = described(run, "checkpoint")
    assert "wrote no model.ckpt: continue it with --resume" in found


def test_an_artefact_and_its_manifest_where_a_checkpoint_is_wanted(
    artefact: Path, tmp_path: Path
) -> None:
    made_from = "give the checkpoint that it was made from"
    assert described(artefact, "checkpoint") == f"is an ONNX model: {made_from}"
    assert described(artefact, "artefact") == ""
    manifest = artefact.with_name(f"{artefact.name}.json")
    assert described(manifest, "checkpoint") == f"is the manifest of {artefact.name}: {made_from}"
    assert described(manifest, "artefact").endswith(f": give {artefact}")


FOLDERS = {
    "openvino_model.xml": "an OpenVINO model",
    "model.plan": "a TensorRT engine",
    "config.pbtxt": "a Triton model",
    "saved_model.pb": "a TensorFlow model",
    "pets/config.pbtxt": "a folder of Triton models",
    "pets/adapter_config.json": "a folder of PEFT adapters",
    "adapter_model.safetensors": "a PEFT adapter without adapter_config.json",
    "birds.ckpt": "a folder of checkpoints",
    "birds.onnx": "a folder of ONNX models",
    "notes": "a folder without a model",
}


@pytest.mark.parametrize("file", FOLDERS)
def test_a_folder_is_named_by_its_files(file: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(CheckpointError, match=f"{tmp_path} is {FOLDERS[file]}: "):
        read_checkpoint(tmp_path)


def test_a_folder_of_artefacts_offers_them_where_they_are_taken(tmp_path: Path) -> None:
    (tmp_path / "pets").mkdir()
    (tmp_path / "pets" / "config.pbtxt").touch()
    what = "is a folder of Triton models"
    for wanted in ("artefact", "any"):
        assert described(tmp_path, wanted) == f"{what}: give {tmp_path / 'pets'}"
    found = described(tmp_path, "checkpoint")
    assert found == f"{what}: give the checkpoint that it was made from"


def test_a_folder_of_hugging_face_has_weights_for_a_backbone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architecture": "vit_small_patch16_224"}')
    (tmp_path / "model.safetensors").touch()
    start = "is the folder of a Hugging Face model: "
    assert described(tmp_path, "checkpoint") == start + GIVE["checkpoint"]
    assert described(tmp_path, "weights") == f"{start}give {tmp_path / 'model.safetensors'}"
    found = described(tmp_path / "config.json", "checkpoint")
    assert found.startswith("is the config of a model, without weights: ")


TEXTS = {
    "a.py": ("print(1)", "a Python script"),
    "a.ipynb": (json.dumps({"cells": [], "nbformat": 4}), "a notebook"),
    "a.toml": ("[serve]", "a TOML file"),
    "a.csv": ("path,label", "a table"),
    "adapter_config.json": ('{"peft_type": "LORA"}', "the config of a PEFT adapter"),
    "b.json": ('{"a": 1}', "a JSON text without weights"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_is_named(name: str, tmp_path: Path) -> None:
    text, what = TEXTS[name]
    (tmp_path / name).write_text(text)
    for wanted in GIVE:
        assert described(tmp_path / name, wanted).startswith(f"is {what}: ")


def test_safetensors_files_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"blocks.0.attn.qkv.lora_A.weight": torch.ones(1)}, path)
    found = described(path, "checkpoint")
    assert found == f"is the weights of a PEFT adapter: give their folder, {tmp_path}"
    save_file({"head.weight": torch.ones(1)}, path)
    assert described(path, "checkpoint").startswith("is a file of weights, such as a backbone's: ")
    assert described(path, "weights") == ""
    save_file({"head.weight": torch.ones(1)}, path, {"format": "aoft-deploy/1"})
    assert described(path, "checkpoint").startswith("is a merged model of aoft-export: ")
    assert described(path, "artefact") == ""


def test_what_is_unknown_or_unreadable_is_not_named(tmp_path: Path) -> None:
    for number, content in enumerate(
        (b"", b"text", b"{", b"[" * 9999, bytes([1] * 7 + [0]) + b"{")
    ):
        (tmp_path / str(number)).write_bytes(content)
        found = described(tmp_path / str(number), "weights")
        assert found in ("", "is a JSON text without weights: give the file that it describes")
    assert described(tmp_path / "missing", "weights") == ""


def test_a_picture_gets_the_advice_of_the_reader(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / "a.png")
    for wanted, advice in GIVE.items():
        assert described(tmp_path / "a.png", wanted) == f"is a picture: {advice}"


def test_a_missing_file_suggests_one_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").touch()
    found = missing(tmp_path / "modle.ckpt")
    assert found.endswith(f"modle.ckpt. Did you mean {tmp_path / 'model.ckpt'}?")
    assert missing(tmp_path / "xyz") == f"There is no file {tmp_path / 'xyz'}."
    assert missing(tmp_path / "none" / "a") == f"There is no file {tmp_path / 'none' / 'a'}."
