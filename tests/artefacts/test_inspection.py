from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.cli.inspect import describe
from aoft_deploy.errors import ArtefactError, CheckpointError
from aoft_deploy.export.merged import export_merged


def test_a_checkpoint_is_described_with_its_task_and_parameter_counts(
    checkpoint: Path, classes: tuple[str, ...]
) -> None:
    found = describe(checkpoint)
    sizes = {name: tensor.numel() for name, tensor in load_file(checkpoint).items()}
    head = sum(size for name, size in sizes.items() if name.startswith("head."))
    assert found["kind"] == "checkpoint"
    assert found["method"] == "rlrr"
    assert found["classes"] == list(classes)
    assert found["training"] == {"epochs": 3}
    assert found["trained_parameters"] == sum(sizes.values())
    assert found["update_parameters"] == sum(sizes.values()) - head
    assert head == 5 * 32 + 5 == found["sites"]["classifier"]
    assert found["sites"]["blocks.0.attn.qkv.q"] == 3 * 32
    assert found["bytes"] == checkpoint.stat().st_size
    assert found["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()


def test_an_artefact_is_described_with_its_graph_and_matching_manifest(artefact: Path) -> None:
    found = describe(artefact)
    assert found["kind"] == "ONNX artefact"
    assert found["opset"] == {"ai.onnx": 23}
    assert found["inputs"] == ["pixel_values float [batch, 3, 16, 16]"]
    assert found["outputs"] == ["logits float [batch, 5]"]
    assert found["nodes"] == sum(found["operators"].values())
    assert found["preprocessing"]["size"] == 16
    assert found["manifest"] == "matches"
    assert found["verification"]["agreement"] == 1.0


def test_an_artefact_without_a_manifest_is_described_as_such(
    artefact: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.onnx").write_bytes(artefact.read_bytes())
    found = describe(tmp_path / "a.onnx")
    assert found["manifest"] == "none"
    assert "verification" not in found


def test_an_artefact_that_differs_from_its_manifest_is_described_as_changed(
    artefact: Path, tmp_path: Path
) -> None:
    manifest = artefact.with_name(artefact.name + ".json").read_bytes()
    (tmp_path / "a.onnx").write_bytes(artefact.read_bytes())
    (tmp_path / "a.onnx.json").write_bytes(manifest)
    assert describe(tmp_path / "a.onnx")["manifest"] == "matches"
    import onnx

    model = onnx.load(artefact)
    model.producer_name = "somebody"
    onnx.save(model, tmp_path / "a.onnx")
    assert "changed after it was verified" in describe(tmp_path / "a.onnx")["manifest"]


def test_a_timm_artefact_is_described_with_its_task(
    checkpoint: Path, backbone_weights: Path, tmp_path: Path
) -> None:
    path = tmp_path / "plain.safetensors"
    export_merged(checkpoint, path, to="timm", backbone=BackboneSource(weights=backbone_weights))
    found = describe(path)
    assert found["kind"] == "timm artefact"
    assert found["tensors"] == len(load_file(path))
    assert found["method"] == "rlrr"
    assert found["manifest"] == "matches"


def test_a_damaged_safetensors_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ArtefactError, match="is no safetensors file"):
        describe(tmp_path / "a.safetensors")


def test_a_manifest_is_described_by_its_entries(artefact: Path) -> None:
    path = artefact.with_name(artefact.name + ".json")
    found = describe(path)
    assert found == {"kind": "manifest", **json.loads(path.read_text("utf-8"))}


def test_a_published_checkpoint_is_described_with_its_parameter_counts(tmp_path: Path) -> None:
    state = {
        "head.weight": torch.zeros(3, 8),
        "head.bias": torch.zeros(3),
        "transformer.encoder.layer.0.attn.query.scale_col": torch.zeros(1, 8),
        "transformer.encoder.layer.0.attn.query.scale_line": torch.zeros(8, 1),
    }
    torch.save(state, tmp_path / "cifar  75.60.pth")
    found = describe(tmp_path / "cifar  75.60.pth")
    assert found["kind"] == "published RLRR checkpoint"
    assert found["sites"] == {"classifier": 27, "blocks.0.attn.qkv.q": 16}
    assert found["update_parameters"] == 16


def test_a_description_survives_json(checkpoint: Path, artefact: Path) -> None:
    for path in (checkpoint, artefact):
        found = describe(path)
        assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"text", "is no JSON file"),
        ("a.json", b"\xff\xfe", "is no JSON file"),
        ("a.json", b"[" * 100_000, "is no JSON file"),
        ("a.json", b'{"artefact": ' + b"9" * 5000 + b"}", "is no JSON file"),
        ("a.json", b"[1]", "is no manifest of aoft-export"),
        ("a.json", b"{}", "is no manifest of aoft-export"),
        ("a.onnx", b"", "is no ONNX model, or a damaged one"),
        ("a.onnx", b"text", "is no ONNX model, or a damaged one"),
        ("a.onnx", b"\x10\x01", "is no valid ONNX model"),
        ("a.ckpt", b"", "is no checkpoint, or a truncated one"),
        ("a.pth", b"\x80\x04text", "is damaged or would run code"),
    ],
)
def test_a_damaged_file_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    error = CheckpointError if name.endswith((".ckpt", ".pth")) else ArtefactError
    with pytest.raises(error, match=message):
        describe(tmp_path / name)


@pytest.mark.parametrize("name", ["missing", "missing.onnx", "missing.json"])
def test_a_missing_file_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no file"):
        describe(tmp_path / name)


def test_a_folder_without_an_artefact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is an empty folder: give what"):
        describe(tmp_path)


def test_invalid_json_in_the_metadata_of_a_foreign_graph_is_shown_as_text(
    artefact: Path, tmp_path: Path, contents: Callable[[Path], dict[str, Any]]
) -> None:
    import onnx

    model = onnx.load(artefact)
    entries = {"deep": "[" * 100_000, "long": "9" * 5000, "plain": "text"}
    onnx.helper.set_model_props(model, entries)
    onnx.save(model, tmp_path / "a.onnx")
    found = describe(tmp_path / "a.onnx")
    assert {key: found[key] for key in entries} == entries
    assert list(contents(tmp_path)) == ["a.onnx"]
