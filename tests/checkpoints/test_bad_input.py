"""For every fault of its input, a command prints one line, exits with 1 and leaves no file.

The tests call the real ``main``. ``refused`` asserts the exit code, the line and the folder.
"""

from __future__ import annotations

import json
import os
import re
import resource
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from safetensors_faults import FAULTS, faulty

from aoft_deploy.checkpoints.checkpoint import save as save_checkpoint
from aoft_deploy.cli.export import main
from aoft_deploy.cli.inspect import main as inspect_main
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import OutputError
from aoft_deploy.tuning.tuned_model import TunedModel

Refused = Callable[..., str]
Change = Callable[[dict[str, Any]], object]

PNG = b"\x89PNG\r\n\x1a\n" + bytes(50)
FOREIGN = {
    "empty": (b"", "is no checkpoint, or a truncated one"),
    "text": (b"this is no checkpoint\n", "is no checkpoint, or a truncated one"),
    "zeros": (bytes(1000), "is no checkpoint, or a truncated one"),
    "png": (PNG, "is a picture: give a model.ckpt, or the folder of its training run"),
    "huge header": (b"\xff" * 1000, "is no checkpoint, or a truncated one"),
    "safetensors": (save({"a": torch.ones(2)}), "is a file of weights, such as a backbone's"),
    "others metadata": (
        save({"a": torch.ones(2)}, {"format": "pt"}),
        "is a file of weights, such as a backbone's",
    ),
    "pickle": (b"\x80\x04K\x01.", "is a pickle, which could run code"),
    "zip": (b"PK\x03\x04" + bytes(50), "is an incomplete zip archive"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_that_is_no_checkpoint_is_refused(
    kind: str, tmp_path: Path, refused: Refused
) -> None:
    content, message = FOREIGN[kind]
    (tmp_path / "model.ckpt").write_bytes(content)
    assert message in refused(main, "--merge", tmp_path / "model.ckpt")


@pytest.mark.parametrize("name", ["missing.ckpt", ".", "..", "folder", "missing/model.ckpt", ""])
def test_a_checkpoint_that_is_not_a_file_is_refused(
    name: str, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    for line in (
        refused(main, "--merge", name, "-o", tmp_path / "a.onnx"),
        refused(main, "--merge", name),
    ):
        assert "There is no file" in line or "is an empty folder" in line or "a folder wi" in line


def test_file_names_that_are_too_long_are_refused(
    checkpoint: Path, tmp_path: Path, refused: Refused
) -> None:
    long = "a" * 300
    assert "too long" in refused(main, "--merge", tmp_path / long)
    assert "too long" in refused(main, "--merge", checkpoint, "-o", tmp_path / f"{long}.onnx")


def test_a_file_name_with_a_line_break_gives_a_message_of_one_line(
    tmp_path: Path, refused: Refused
) -> None:
    assert "There is no file" in refused(main, "--merge", tmp_path / "a\nb")


def test_a_truncated_checkpoint_is_refused(
    checkpoint: Path, tmp_path: Path, refused: Refused
) -> None:
    data = checkpoint.read_bytes()
    (header,) = struct.unpack("<Q", data[:8])
    offsets = {0, 1, 7, 8, 9, header, header + 7, header + 8, header + 9, len(data) - 1}
    offsets |= {len(data) * i // 50 for i in range(50)}
    for offset in offsets:
        (tmp_path / "model.ckpt").write_bytes(data[:offset])
        line = refused(main, "--merge", tmp_path / "model.ckpt")
        assert "is no checkpoint, or a truncated one" in line


def test_a_checkpoint_with_bytes_after_its_end_is_refused(
    checkpoint: Path, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "model.ckpt").write_bytes(checkpoint.read_bytes() + b"more")
    line = refused(main, "--merge", tmp_path / "model.ckpt")
    assert "is no checkpoint, or a truncated one" in line


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_with_a_faulty_header_is_refused(
    fault: str, checkpoint: Path, backbone_weights: Path, tmp_path: Path, refused: Refused
) -> None:
    path = faulty(checkpoint, tmp_path / "model.ckpt", fault)
    line = refused(main, "--merge", path, "--backbone-weights", backbone_weights, "--to", "timm")
    assert re.search(FAULTS[fault][1], line), line
    assert re.search(FAULTS[fault][1], refused(inspect_main, path))


def replaced(key: str, value: object) -> Change:
    return lambda data: data.update({key: value})


def inside(key: str, name: str, value: object) -> Change:
    return lambda data: data[key].update({name: value})


METADATA: dict[str, tuple[Change, str]] = {
    "newer format": (replaced("format", 2), "has format 2, but this version reads up to 1"),
    "format as text": (replaced("format", "1"), "lacks format as int"),
    "no format": (lambda data: data.pop("format"), "lacks format as int"),
    "method as number": (replaced("method", 3), "lacks method as str"),
    "classes as text": (replaced("classes", "cat"), "lacks classes as list"),
    "no classes": (replaced("classes", []), "has no classifier"),
    "too few classes": (replaced("classes", ["a"]), "head.head.weight has shape"),
    "training as list": (replaced("training", []), "lacks training as dict"),
    "backbone as text": (replaced("backbone", "vit"), "lacks backbone as dict"),
    "empty backbone": (replaced("backbone", {}), "names no backbone"),
    "backbone with more": (inside("backbone", "more", 1), "names no backbone"),
    "name as number": (inside("backbone", "name", 3), "names no backbone"),
    "no digest": (inside("backbone", "digest", None), "names no backbone"),
    "digest as number": (inside("backbone", "digest", 7), "names no backbone"),
    "origin as number": (inside("backbone", "origin", 7), "names no backbone"),
    "args as list": (inside("backbone", "args", []), "names no backbone"),
    "args as text": (inside("backbone", "args", "img_size"), "names no backbone"),
    "settings as list": (replaced("settings", []), "lacks settings as dict"),
    "unknown setting": (inside("settings", "rnak", 1), "Did you mean rank"),
    "rank as text": (inside("settings", "rank", "1"), "rank of rlrr is '1'"),
    "rank of zero": (inside("settings", "rank", 0), "rank is 0"),
    "rank of a billion": (inside("settings", "rank", 10**9), "rank is 1000000000"),
    "unknown init": (inside("settings", "init", "one"), "Unknown init of rlrr 'one'"),
    "unknown method": (replaced("method", "rlr"), "Unknown method 'rlr'. Did you mean rlrr"),
    "other method": (replaced("method", "lora"), "init"),
    "preprocessing as list": (replaced("preprocessing", []), "lacks preprocessing as dict"),
    "empty preprocessing": (replaced("preprocessing", {}), "Preprocessing has the keys none"),
    "size as text": (inside("preprocessing", "size", "16"), "size is '16'"),
    "std of zero": (inside("preprocessing", "std", [0, 1, 1]), "must be three numbers above 0"),
    "mean of two": (
        inside("preprocessing", "mean", [0, 1]),
        "must be three numbers, one per channel",
    ),
    "crop of nan": (inside("preprocessing", "crop_pct", float("nan")), "crop_pct is nan"),
    "other size": (inside("preprocessing", "size", 32), "prepares images of 32 pixels"),
    "unknown backbone": (
        inside("backbone", "name", "vit_bsae_patch16_224"),
        "Unknown backbone 'vit_bsae_patch16_224'. Did you mean vit_base_patch16_224",
    ),
    "other backbone": (inside("backbone", "name", "test_vit"), "lacks|shape|was trained on"),
    "no transformer": (inside("backbone", "name", "resnet10t"), "timm cannot create resnet10t"),
    "unknown argument": (inside("backbone", "args", {"img_sze": 16}), "timm cannot create"),
    "impossible size": (inside("backbone", "args", {"img_size": -1}), "timm cannot create|shape"),
}


@pytest.mark.parametrize("fault", METADATA)
def test_wrong_metadata_are_refused(
    fault: str,
    checkpoint: Path,
    backbone_weights: Path,
    with_metadata: Callable[..., Path],
    tmp_path: Path,
    refused: Refused,
) -> None:
    change, message = METADATA[fault]
    path = with_metadata(checkpoint, tmp_path / "model.ckpt", change)
    line = refused(main, "--merge", path, "--backbone-weights", backbone_weights)
    assert re.search(message, line), line


@pytest.mark.parametrize(
    "text",
    ["", "text", "[1]", "3", "null", "[" * 100_000, '{"format": ' + "9" * 5000 + "}"],
    ids=lambda text: text[:12],
)
def test_metadata_without_a_json_object_are_refused(
    text: str, tmp_path: Path, refused: Refused
) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.ckpt", {"aoft": text})
    line = refused(main, "--merge", tmp_path / "model.ckpt")
    assert "The metadata of" in line
    assert "The metadata of" in refused(inspect_main, tmp_path / "model.ckpt")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("checkpoint_path", "/etc/hostname"),
        ("pretrained_cfg", {"file": "/etc/hostname"}),
        ("pretrained_cfg_overlay", {"url": "http://localhost:9/weights.pth"}),
        ("cache_dir", "elsewhere"),
        ("pretrained", True),
        ("num_classes", 7),
        ("weights", "other.pth"),
        ("name", "resnet10t"),
        ("norm_layer", {"a": 1}),
    ],
)
def test_a_checkpoint_cannot_make_timm_load_other_files(
    key: str,
    value: object,
    checkpoint: Path,
    backbone_weights: Path,
    with_metadata: Callable[..., Path],
    tmp_path: Path,
    refused: Refused,
) -> None:
    path = with_metadata(
        checkpoint, tmp_path / "a.ckpt", lambda data: data["backbone"]["args"].update({key: value})
    )
    line = refused(main, "--merge", path, "--backbone-weights", backbone_weights)
    assert f"must not be made with {key}=" in line


def altered(
    source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], object]
) -> Path:
    """Copy a checkpoint after ``change`` has changed its tensors in place."""
    data = source.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    tensors = load_file(source)
    change(tensors)
    save_file(tensors, target, metadata)
    return target


SCALE = "update.blocks.0.mlp.fc1.scale_in"


def put(value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({SCALE: value})


def filled(value: float) -> torch.Tensor:
    return torch.full((1, 32), value)


TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing": (lambda tensors: tensors.pop(SCALE), f"The checkpoint lacks {SCALE}"),
    "no head": (lambda tensors: tensors.pop("head.head.bias"), "lacks head.head.bias"),
    "more": (
        lambda tensors: tensors.update({"update.blocks.9.x": torch.ones(1)}),
        "holds update.blocks.9.x, which the model has no place for",
    ),
    "none": (lambda tensors: tensors.clear(), "The checkpoint lacks"),
    "shape": (put(torch.ones(2, 32)), r"has shape \(2, 32\) in the checkpoint"),
    "vector": (put(torch.ones(32)), r"has shape \(32,\) in the checkpoint"),
    "nan": (put(filled(float("nan"))), "holds values that are not finite"),
    "inf": (put(filled(float("inf"))), "holds values that are not finite"),
    "overflow": (put(filled(1e38)), "not finite"),
    "wide": (put(filled(1.0).double() * 1e300), "not finite"),
    "integers": (put(torch.ones(1, 32, dtype=torch.int64)), "must be a float type"),
    "booleans": (put(torch.ones(1, 32, dtype=torch.bool)), "must be a float type"),
    "float8": (put(filled(1.0).to(torch.float8_e4m3fn)), "must be a float type"),
}


@pytest.mark.parametrize("fault", TENSORS)
def test_wrong_tensors_are_refused(
    fault: str, checkpoint: Path, backbone_weights: Path, tmp_path: Path, refused: Refused
) -> None:
    change, message = TENSORS[fault]
    path = altered(checkpoint, tmp_path / "model.ckpt", change)
    options = ["--merge", path, "--backbone-weights", backbone_weights, "--to", "timm"]
    line = refused(main, *options)
    assert re.search(message, line), line


@pytest.fixture
def weights(backbone_weights: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copy the backbone's weights after a function has changed them in place."""

    def make(change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        tensors = load_file(backbone_weights)
        change(tensors)
        save_file(tensors, tmp_path / "weights.safetensors")
        return tmp_path / "weights.safetensors"

    return make


def test_weights_other_than_those_trained_on_are_refused(
    checkpoint: Path, weights: Callable[..., Path], refused: Refused
) -> None:
    name = "blocks.0.norm1.bias"
    path = weights(lambda tensors: tensors[name].view(-1)[3].add_(1e-6))
    line = refused(main, "--merge", checkpoint, "--backbone-weights", path)
    assert "was trained on aoft_vit_nano with weights" in line
    assert "--force" in line


def test_weights_without_one_tensor_are_refused(
    checkpoint: Path, weights: Callable[..., Path], refused: Refused
) -> None:
    path = weights(lambda tensors: tensors.pop("blocks.0.mlp.fc2.bias"))
    line = refused(main, "--merge", checkpoint, "--backbone-weights", path, "--force")
    assert "lacks blocks.0.mlp.fc2.bias: it holds weights of another model" in line


def test_weights_with_another_shape_are_refused(
    checkpoint: Path, weights: Callable[..., Path], refused: Refused
) -> None:
    path = weights(lambda tensors: tensors.update({"norm.bias": torch.ones(33)}))
    line = refused(main, "--merge", checkpoint, "--backbone-weights", path, "--force")
    assert "has norm.bias of shape (33,)" in line
    assert "the model needs (32,)" in line


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(
    value: float, checkpoint: Path, weights: Callable[..., Path], refused: Refused
) -> None:
    path = weights(lambda tensors: tensors["cls_token"].fill_(value))
    line = refused(main, "--merge", checkpoint, "--backbone-weights", path, "--force")
    assert "cls_token in" in line
    assert "not finite" in line


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin", ".npz", ".gz", ""])
@pytest.mark.parametrize("content", [b"", b"text", bytes(1000), PNG], ids=len)
def test_a_file_that_holds_no_weights_is_refused(
    suffix: str, content: bytes, checkpoint: Path, tmp_path: Path, refused: Refused
) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    line = refused(main, "--merge", checkpoint, "--backbone-weights", path)
    assert ("is a picture" if content == PNG else "cannot be read as weights") in line


def test_a_weights_file_that_does_not_exist_is_refused(
    checkpoint: Path, tmp_path: Path, refused: Refused
) -> None:
    path = tmp_path / "missing.pth"
    line = refused(main, "--merge", checkpoint, "--backbone-weights", path)
    assert line == f"There is no file {path}."
    line = refused(main, "--merge", checkpoint, "--backbone-weights", tmp_path)
    assert line == f"{tmp_path} is an empty folder: give a file with all weights of the backbone."


def test_a_backbone_whose_weights_timm_cannot_load_needs_a_file(
    checkpoint: Path, refused: Refused
) -> None:
    line = refused(main, "--merge", checkpoint, "-o", "a.onnx")
    assert "(backbone.safetensors): give them with --backbone-weights" in line


def test_a_backbone_on_the_hub_is_refused_without_network(
    checkpoint: Path,
    tmp_path: Path,
    with_metadata: Callable[..., Path],
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    name = "vit_tiny_patch16_224.augreg_in21k"
    backbone = {"name": name, "digest": "0" * 64, "origin": "timm", "args": {}}
    path = with_metadata(checkpoint, tmp_path / "a.ckpt", replaced("backbone", backbone))
    line = refused(main, "--merge", path)
    assert line.startswith(f"timm cannot load the weights of {name} (")
    assert "check the name and the network, or give a file with --backbone-weights" in line


def test_an_unknown_tag_of_a_backbone_is_refused(checkpoint: Path, refused: Refused) -> None:
    line = refused(main, "--merge", checkpoint, "--backbone", "vit_tiny_patch16_224.no_such_tag")
    assert "timm cannot load the weights of" in line


def test_an_unknown_backbone_suggests_close_names(checkpoint: Path, refused: Refused) -> None:
    line = refused(main, "--merge", checkpoint, "--backbone", "vit_tiny_patch16_242")
    assert "Unknown backbone 'vit_tiny_patch16_242'. Did you mean vit_tiny_patch16_224" in line


def test_an_unknown_exporter_suggests_close_names(checkpoint: Path, refused: Refused) -> None:
    line = refused(main, "--merge", checkpoint, "--to", "onx")
    assert line.startswith("Unknown exporter 'onx'. Did you mean onnx? Known: aoti, onnx, ")


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Simulate a full disk: the system refuses to write files of more than ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("to", "old"), [("onnx", True), ("timm", True), ("timm", False)])
def test_a_full_disk_keeps_the_previous_file(
    to: str,
    old: bool,
    checkpoint: Path,
    backbone_weights: Path,
    tmp_path: Path,
    refused: Refused,
) -> None:
    output = tmp_path / ("a.onnx" if to == "onnx" else "a.safetensors")
    if old:
        output.write_text("old")
        output.with_name(output.name + ".json").write_text('{"sha256": "old"}')
    options = ["--merge", checkpoint, "--backbone-weights", backbone_weights, "--to", to]
    options += ["--overwrite"]
    with files_of_at_most(20_000):
        line = refused(main, *options, "-o", output)
    assert "could not be written" in line


def test_a_disk_that_is_full_at_the_manifest_keeps_the_previous_files(
    checkpoint: Path,
    backbone_weights: Path,
    tmp_path: Path,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(path: Path) -> None:
        raise OSError(28, os.strerror(28))

    output = tmp_path / "a.safetensors"
    output.write_text("old")
    monkeypatch.setattr("aoft_deploy.export.publishing.settle", full)
    options = ["--merge", checkpoint, "--backbone-weights", backbone_weights, "--to", "timm"]
    line = refused(main, *options, "-o", output, "--overwrite")
    assert line == f"Cannot write {output}: No space left on device."


def test_saving_a_checkpoint_on_a_full_disk_is_an_output_error(
    make_tuned: Callable[..., TunedModel], classes: tuple[str, ...], tmp_path: Path
) -> None:
    half = (0.5, 0.5, 0.5)
    preprocessing = Preprocessing(16, crop_pct=1.0, mean=half, std=half)
    path = tmp_path / "model.ckpt"
    path.write_text("old")
    with pytest.raises(OutputError, match=r"Cannot write .*model.ckpt"), files_of_at_most(1000):
        save_checkpoint(make_tuned(), path, classes=classes, preprocessing=preprocessing)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["model.ckpt"]


def test_an_output_that_cannot_be_written_is_refused(
    checkpoint: Path, backbone_weights: Path, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    options = ["--merge", checkpoint, "--backbone-weights", backbone_weights, "--to", "timm", "-o"]
    line = refused(main, *options, tmp_path / "file" / "a.safetensors")
    assert "Cannot write into" in line
    assert "is a folder" in refused(main, *options, tmp_path)
    assert "is a folder" in refused(main, *options, tmp_path / "folder.safetensors")
    assert "is no file" in refused(main, *options, tmp_path / "pipe.safetensors")
    assert "does not end in .safetensors" in refused(main, *options, tmp_path / "a.onnx")
    if sys.platform == "linux":
        assert "Cannot write into /proc" in refused(main, *options, "/proc/a.safetensors")


def test_an_output_that_is_the_checkpoint_is_refused(
    checkpoint: Path, backbone_weights: Path, tmp_path: Path, refused: Refused
) -> None:
    path = tmp_path / "task.safetensors"
    path.write_bytes(checkpoint.read_bytes())
    options = ["--merge", path, "--backbone-weights", backbone_weights, "--to", "timm"]
    assert "is an input of this export" in refused(main, *options, "-o", path)
    assert "is an input of this export" in refused(main, *options)


def test_an_unreadable_image_for_verification_is_refused(
    checkpoint: Path, backbone_weights: Path, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    options = ["--merge", checkpoint, "--backbone-weights", backbone_weights]
    line = refused(main, *options, "-o", tmp_path / "a.onnx", "--images", tmp_path / "a.png")
    assert line.startswith("Cannot read image")
