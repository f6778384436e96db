"""What exists is replaced only with ``overwrite``, and only if it belongs to the export."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from aoft_deploy.artefacts.manifest import artefact_digest, manifest_path
from aoft_deploy.artefacts.registry import get_exporter
from aoft_deploy.cli.export import main
from aoft_deploy.errors import OutputError
from aoft_deploy.export.output_paths import artefact_path, beside, check_output
from aoft_deploy.export.publishing import publish

FILE, FOLDER = get_exporter("onnx"), get_exporter("triton")
EXISTS = r"exists: give another `output`, or replace it with `overwrite=True`\."


def triton_model(path: Path) -> Path:
    """A folder that looks like a model of the triton exporter, with its manifest."""
    (path / "1").mkdir(parents=True)
    (path / "1" / "model.onnx").write_text("graph")
    (path / "config.pbtxt").write_text('backend: "onnxruntime"')
    manifest_path(path).write_text(json.dumps({"sha256": artefact_digest(path)}))
    return path


@pytest.mark.parametrize(
    ("exporter", "precision", "name"),
    [
        ("onnx", "fp32", "model.onnx"),
        ("onnx", "int8", "model-int8.onnx"),
        ("openvino", "bf16", "model-bf16.openvino"),
        ("timm", "fp32", "model.safetensors"),
    ],
)
def test_the_default_name_states_a_precision_below_fp32(
    exporter: str, precision: str, name: str
) -> None:
    path = artefact_path(beside(Path("runs/model.ckpt")), get_exporter(exporter), precision)
    assert path == Path("runs") / name


def test_an_artefact_of_the_current_folder_is_named_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lora").mkdir()
    monkeypatch.chdir(tmp_path / "lora")
    assert beside(Path(".")) == tmp_path / "lora"
    assert artefact_path(beside(Path("/")), FILE, "fp32") == Path("/.onnx")


def test_a_new_path_and_an_empty_folder_are_accepted(tmp_path: Path) -> None:
    check_output(FILE, tmp_path / "new" / "a.onnx", [])
    (tmp_path / "model").mkdir()
    check_output(FOLDER, tmp_path / "model", [])


@pytest.mark.parametrize("name", ["a.onnx", "a.onnx.json"])
def test_an_existing_file_or_manifest_is_replaced_only_with_overwrite(
    name: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text('{"sha256": ""}')
    with pytest.raises(OutputError, match=f"{name} {EXISTS}"):
        check_output(FILE, tmp_path / "a.onnx", [])
    check_output(FILE, tmp_path / "a.onnx", [], overwrite=True)
    path.unlink()
    path.symlink_to("gone")
    with pytest.raises(OutputError, match=f"{name} {EXISTS}"):
        check_output(FILE, tmp_path / "a.onnx", [])


def test_a_json_file_that_is_no_manifest_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").touch()
    (tmp_path / "a.onnx.json").write_text('{"my": "notes"}')
    with pytest.raises(OutputError, match=r"is no manifest of aoft-export.*move both away"):
        check_output(FILE, tmp_path / "a.onnx", [], overwrite=True)


def test_a_folder_is_replaced_only_if_it_is_an_unchanged_artefact(tmp_path: Path) -> None:
    model = triton_model(tmp_path / "photos")
    with pytest.raises(OutputError, match=f"photos {EXISTS}"):
        check_output(FOLDER, model, [])
    check_output(FOLDER, model, [], overwrite=True)
    (model / "config.pbtxt").write_text("instance_group [ { count: 4 } ]")
    with pytest.raises(OutputError, match=r"photos or its manifest was changed.*move both away"):
        check_output(FOLDER, model, [], overwrite=True)
    manifest_path(model).unlink()
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"photos exists and is no triton artefact"):
            check_output(FOLDER, model, [], overwrite)
    with pytest.raises(OutputError, match=r"exists and is no tensorrt artefact"):
        check_output(get_exporter("tensorrt"), triton_model(tmp_path / "b"), [], overwrite=True)


@pytest.mark.parametrize("exporter", ["onnx", "triton"])
def test_an_input_is_never_replaced(exporter: str, tmp_path: Path) -> None:
    if exporter == "onnx":
        output = source = tmp_path / "a.onnx"
        source.touch()
    else:
        output = triton_model(tmp_path / "a")
        source = output / "1" / "model.onnx"
    link = tmp_path / "link"
    link.symlink_to(source)
    for path in (source, link):
        with pytest.raises(OutputError, match="is an input of this export"):
            check_output(get_exporter(exporter), output, [path], overwrite=True)


def test_paths_that_cannot_become_the_artefact_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "pipe.onnx.json").mkdir()
    os.mkfifo(tmp_path / "queue.onnx")
    for exporter, name, message in (
        (FILE, "a.bin", "does not end in .onnx"),
        (FILE, ".", "is a folder"),
        (FILE, "file/a.onnx", "file is no folder"),
        (FILE, "pipe.onnx", r"pipe\.onnx\.json exists and is no file"),
        (FILE, "queue.onnx", "exists and is no file"),
        (FOLDER, "file", "exists and is no triton artefact"),
        (FOLDER, "link", "cannot become a folder"),
    ):
        with pytest.raises(OutputError, match=message):
            check_output(exporter, tmp_path / name, [], overwrite=True)


def test_the_command_names_its_options_and_keeps_the_file(
    checkpoint: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "a.onnx").write_text("precious")
    line = refused(main, "--merge", checkpoint, "-o", tmp_path / "a.onnx")
    assert line.endswith("a.onnx exists: give another --output, or replace it with --overwrite.")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_failed_replacement_restores_artefact_and_manifest(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "a.onnx"
    (tmp_path / "draft").mkdir()
    draft = tmp_path / "draft" / output.name
    if kind == "file":
        output.write_text("graph")
        manifest_path(output).write_text(json.dumps({"sha256": artefact_digest(output)}))
        draft.write_text("new")
    else:
        triton_model(output)
        triton_model(draft)
    before = artefact_digest(output), manifest_path(output).read_text()
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if target == output:
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OutputError, match="No space left"):
            publish(draft, output, {"sha256": "new"})
    assert (artefact_digest(output), manifest_path(output).read_text()) == before
    publish(draft, output, {"sha256": "new"})
    assert json.loads(manifest_path(output).read_text()) == {"sha256": "new"}
    assert not draft.exists()
