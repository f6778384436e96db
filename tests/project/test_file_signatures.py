"""Files of a wrong kind are recognised by their first bytes, whatever their suffix."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from safetensors.torch import save

from aoft_deploy.artefacts.onnx_metadata import read_metadata
from aoft_deploy.checkpoints.checkpoint import read_checkpoint
from aoft_deploy.checkpoints.peft_adapter import CONFIG, WEIGHTS, read_peft_folder
from aoft_deploy.checkpoints.rlrr import read_published
from aoft_deploy.cli.export import main as export_main
from aoft_deploy.cli.inspect import main as inspect_main
from aoft_deploy.errors import ArtefactError, CheckpointError
from aoft_deploy.file_signatures import FOREIGN, file_kind, foreign
from aoft_deploy.fleet.packed_tasks import PackedTasks

SAFETENSORS = save({"a": torch.ones(2, 3)})


def bytes_of(write: Callable[[io.BytesIO], object]) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def tarred(file: io.BytesIO) -> None:
    with tarfile.open(fileobj=file, mode="w") as archive:
        info = tarfile.TarInfo("model.safetensors")
        info.size = len(SAFETENSORS)
        archive.addfile(info, io.BytesIO(SAFETENSORS))


def zipped(file: io.BytesIO) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model.safetensors", SAFETENSORS)


def keras(file: io.BytesIO) -> None:
    with zipfile.ZipFile(file, "w") as archive:  # as Model.save writes it
        for name in ("metadata.json", "config.json", "model.weights.h5"):
            archive.writestr(name, b"")


def exported(file: io.BytesIO) -> None:
    torch.export.save(torch.export.export(torch.nn.Identity(), (torch.ones(1),)), file)


def graph(file: io.BytesIO) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    node = helper.make_node("Identity", ["x"], ["y"])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    onnx.save(helper.make_model(helper.make_graph([node], "g", [value], [out])), file)


def scripted(file: io.BytesIO) -> None:
    with zipfile.ZipFile(file, "w") as archive:  # as torch.jit.save writes it, which warns
        archive.writestr("model/data.pkl", b"")
        archive.writestr("model/code/__torch__.py", b"")
        archive.writestr("model/constants.pkl", b"")


TORCH = bytes_of(lambda file: torch.save({"a": torch.ones(3)}, file))
OLD = bytes_of(
    lambda file: torch.save({"a": torch.ones(3)}, file, _use_new_zipfile_serialization=False)
)

FILES: dict[str, tuple[str, bytes]] = {
    "Git LFS": (
        "lfs",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 346284714\n",
    ),
    "page": ("html", b"<!DOCTYPE html>\n<html><body>Sign in</body></html>"),
    "page in capitals": ("html", b"\n  <HTML><HEAD>"),
    "page with a mark": ("html", b"\xef\xbb\xbf<!doctype html>"),
    "page after a comment": ("html", b"<!-- saved -->\n<html>"),
    "denied by a bucket": ("xml", b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code>'),
    "JSON": ("json", b'{"error": "Repository not found"}'),
    "index": ("index", b'{"metadata": {}, "weight_map": {"a": "model-00001-of-2"}}'),
    "gzip": ("gzip", gzip.compress(SAFETENSORS)),
    "bzip2": ("bzip2", bz2.compress(SAFETENSORS)),
    "xz": ("xz", lzma.compress(SAFETENSORS)),
    "Zstandard": ("zstd", b"\x28\xb5\x2f\xfd\x24\x0c" + bytes(20)),
    "7z": ("7z", b"7z\xbc\xaf\x27\x1c" + bytes(20)),
    "RAR": ("rar", b"Rar!\x1a\x07\x01\0" + bytes(20)),
    "tar": ("tar", bytes_of(tarred)),
    "zip": ("archive", bytes_of(zipped)),
    "zip without its end": ("cut", TORCH[: len(TORCH) // 2]),
    "TorchScript": ("script", bytes_of(scripted)),
    "array": ("npy", bytes_of(lambda file: np.save(file, np.ones(3)))),
    "HDF5": ("hdf5", b"\x89HDF\r\n\x1a\n" + bytes(20)),
    "GGUF": ("gguf", b"GGUF\3\0\0\0" + bytes(20)),
    "Keras": ("keras", bytes_of(keras)),
    "torch.export": ("exported", bytes_of(exported)),
    "OpenVINO": ("openvino", b'<?xml version="1.0"?>\n<net name="g" version="11">\n'),
    "TensorRT": ("tensorrt", b"ftrt" + bytes(20)),
    "TensorFlow Lite": ("tflite", b"\x1c\0\0\0TFL3" + bytes(20)),
    "picture": ("picture", bytes_of(lambda file: Image.new("RGB", (3, 3)).save(file, "PNG"))),
    "photograph": ("picture", bytes_of(lambda file: Image.new("RGB", (3, 3)).save(file, "JPEG"))),
    "document": ("pdf", b"%PDF-1.7\n"),
    "ONNX": ("onnx", bytes_of(graph)),
    "safetensors": ("safetensors", SAFETENSORS),
    "torch": ("torch", TORCH),
    "old torch": ("pickle", OLD),
    "pickle": ("pickle", pickle.dumps({"a": 1})),
    "arrays": ("npz", bytes_of(lambda file: np.savez(file, a=np.ones(3)))),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_recognised_by_its_first_bytes(name: str, tmp_path: Path) -> None:
    kind, content = FILES[name]
    path = tmp_path / "weights.bin"
    path.write_bytes(content)
    assert file_kind(path) == kind
    assert foreign(path) == f"is {FOREIGN[kind]}"
    assert foreign(path, kind) == ""


def test_every_foreign_kind_has_an_example() -> None:
    assert {kind for kind, _ in FILES.values()} | {"packed"} == set(FOREIGN)


@pytest.mark.parametrize("content", [b"", b"text", bytes(1000), b"\xff" * 300, b"P", b"PK", b"<"])
def test_an_unknown_kind_is_not_guessed(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    assert file_kind(path) == ""
    assert foreign(path) == ""
    assert foreign(tmp_path / "missing") == ""


def adapter(path: Path) -> object:
    folder = path.with_suffix("")
    folder.mkdir()
    (folder / CONFIG).write_text('{"peft_type": "LORA"}')
    (folder / WEIGHTS).write_bytes(path.read_bytes())
    return read_peft_folder(folder)


def config(path: Path) -> object:
    folder = path.with_suffix("")
    folder.mkdir()
    (folder / CONFIG).write_bytes(path.read_bytes())
    return read_peft_folder(folder)


READERS: dict[str, Callable[[Path], object]] = {
    "checkpoint": read_checkpoint,
    "published": read_published,
    "adapter": adapter,
    "config": config,
    "ONNX": read_metadata,
    "packed": PackedTasks,
}
DOWNLOADS = ("Git LFS", "page", "denied by a bucket", "gzip", "tar", "zip", "zip without its end")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", DOWNLOADS)
def test_every_reader_names_the_kind_of_a_failed_download(
    name: str, reader: str, tmp_path: Path
) -> None:
    kind, content = FILES[name]
    path = tmp_path / "task.file"
    path.write_bytes(content)
    with pytest.raises(ArtefactError if reader == "ONNX" else CheckpointError) as caught:
        READERS[reader](path)
    assert f"is {FOREIGN[kind]}" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz", ".gz"])
@pytest.mark.parametrize("name", [*DOWNLOADS, "TorchScript", "HDF5", "index", "ONNX"])
def test_backbone_weights_of_a_wrong_kind_are_refused(
    name: str, suffix: str, checkpoint: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    kind, content = FILES[name]
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    line = refused(export_main, "--merge", checkpoint, "--backbone-weights", path)
    assert line == f"{path} is {FOREIGN[kind]}."


def test_no_message_repeats_pytorchs_advice(
    tmp_path: Path, refused: Callable[..., str], checkpoint: Path
) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.ones(2), "model": torch.nn.Linear(2, 2)}, path)
    line = refused(export_main, "--merge", checkpoint, "--backbone-weights", path)
    assert "holds objects of torch.nn.modules.linear.Linear" in line
    assert "which could run code: save the model's state_dict() alone" in line
    for content in (b"", b"text", OLD[:40], TORCH[:-1], pickle.dumps({"a": object})):
        path.write_bytes(content)
        for lines in (
            refused(export_main, "--merge", checkpoint, "--backbone-weights", path),
            refused(export_main, "--merge", path),
            refused(inspect_main, path),
        ):
            assert "weights_only" not in lines
            assert "add_safe_globals" not in lines


def test_a_checkpoint_may_have_any_suffix(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "task.pth"
    path.write_bytes(checkpoint.read_bytes())
    assert read_checkpoint(path).method == read_checkpoint(checkpoint).method
