from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aoft_deploy.artefacts.engine import EngineOptions, check_lanes
from aoft_deploy.artefacts.manifest import manifest_path, read_manifest
from aoft_deploy.artefacts.onnx_metadata import digest_entry, seal
from aoft_deploy.artefacts.registry import exporter_names, get_exporter, load_artefact, load_fleet
from aoft_deploy.errors import ArtefactError, SettingError, UnknownNameError


def test_the_exporters_of_this_repository_are_installed() -> None:
    assert {"onnx", "openvino", "peft", "timm"} <= set(exporter_names())
    assert list(exporter_names()) == sorted(exporter_names())


@pytest.mark.parametrize("name", exporter_names())
def test_every_exporter_has_valid_attributes(name: str) -> None:
    exporter = get_exporter(name)
    assert exporter.suffix.startswith(".")
    assert 0 < exporter.tolerance < 1
    assert callable(exporter.export)
    assert callable(exporter.load)


def test_no_two_exporters_write_the_same_suffix() -> None:
    suffixes = [get_exporter(name).suffix for name in exporter_names()]
    assert len(set(suffixes)) == len(suffixes)


def test_a_close_name_is_suggested() -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown exporter 'onx'\. Did you mean onnx"):
        get_exporter("onx")


@pytest.mark.parametrize("name", ["", "ONNX", "onnx "])
def test_a_name_that_no_exporter_has_is_refused(name: str) -> None:
    with pytest.raises(UnknownNameError, match="Known: aoti, onnx, openvino, peft, tensorrt, timm"):
        get_exporter(name)


@pytest.mark.parametrize("name", ["model.ckpt", "model", "model.ONNX", "onnx"])
def test_a_suffix_that_no_exporter_writes_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ArtefactError, match="is no artefact of aoft-export: give what aoft-expo"):
        load_artefact(tmp_path / name)


@pytest.mark.parametrize("suffix", [".onnx", ".safetensors"])
def test_an_artefact_that_does_not_exist_is_refused(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(ArtefactError, match=r"(There is no file|No such file)"):
        load_artefact(tmp_path / f"missing{suffix}")


def test_an_onnx_artefact_opens_by_its_suffix(artefact: Path) -> None:
    engine = load_artefact(artefact)
    assert not engine.takes_pixels
    assert engine.info["format"] == "aoft-deploy/1"


@pytest.mark.parametrize("load", [load_artefact, load_fleet])
def test_an_artefact_that_was_changed_after_its_manifest_is_refused(
    fleet_artefact: Path, tmp_path: Path, load: Callable[[Path], object]
) -> None:
    artefact, manifest = tmp_path / "f.onnx", tmp_path / "f.onnx.json"
    artefact.write_bytes(fleet_artefact.read_bytes())
    load(artefact)
    manifest.write_bytes(fleet_artefact.with_name(fleet_artefact.name + ".json").read_bytes())
    load(artefact)
    content = bytearray(artefact.read_bytes())
    content[len(content) // 2] ^= 1
    artefact.write_bytes(content)
    with pytest.raises(
        ArtefactError, match=r"f\.onnx is half overwritten, .* or was changed since"
    ):
        load(artefact)
    artefact.write_bytes(content[: -len(digest_entry(64 * "0"))])
    seal(artefact)  # consistent in itself, but not what the manifest describes
    with pytest.raises(ArtefactError, match=r"f\.onnx was changed after its manifest f\.onnx"):
        load(artefact)
    manifest.write_text("[]", "utf-8")
    with pytest.raises(ArtefactError, match=r"f\.onnx\.json is no manifest of aoft-export"):
        load(artefact)


def test_an_artefact_with_a_seal_is_hashed_once_to_be_loaded(
    artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, manifest = tmp_path / "a.onnx", tmp_path / "a.onnx.json"
    path.write_bytes(artefact.read_bytes())
    entries = read_manifest(manifest_path(artefact))
    manifest.write_text(json.dumps(entries), "utf-8")
    hashed = list[int]()
    sha256 = hashlib.sha256

    def counting(content: bytes = b"", **options: bool) -> Any:
        hashed.append(len(content))
        return sha256(content, **options)

    monkeypatch.setattr(hashlib, "sha256", counting)
    monkeypatch.setattr("aoft_deploy.artefacts.manifest.file_digest", None)  # reads all of a file
    load_artefact(path)
    size = path.stat().st_size
    assert size - 200 < sum(n for n in hashed if n > 64) < size
    del entries["seal"]  # as of an older version: the manifest's SHA-256 is compared
    manifest.write_text(json.dumps(entries), "utf-8")
    with pytest.raises(TypeError, match="NoneType"):
        load_artefact(path)


@pytest.mark.parametrize("engine", [None, "onnxruntime", "openvino"])
@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("lanes", [0, 2])
def test_a_cpu_computes_one_batch_at_a_time(
    engine: str | None, device: str | None, lanes: int, artefact: Path, fleet_artefact: Path
) -> None:
    message = f"`lanes` is {lanes}, but cpu computes one batch at a time: leave it out, or choose"
    options = EngineOptions(engine, None, device, lanes)
    with pytest.raises(SettingError, match=message):
        load_artefact(artefact, options)
    with pytest.raises(SettingError, match=message):
        load_fleet(fleet_artefact, EngineOptions(device=device, lanes=lanes))


@pytest.mark.parametrize("name", exporter_names())
def test_every_exporters_engines_refuse_lanes_on_a_cpu(name: str, tmp_path: Path) -> None:
    exporter = get_exporter(name)
    path = tmp_path / f"a{exporter.suffix}"
    path.touch()
    with pytest.raises(SettingError, match="`lanes` is 2, but cpu computes one batch at a time"):
        load_artefact(path, EngineOptions(device="cpu", lanes=2))


def test_a_gpu_computes_several_batches_at_once() -> None:
    for device in ("cuda", "cuda:1", "cuda:0"):
        check_lanes(EngineOptions(lanes=4), device)
        with pytest.raises(SettingError, match="`lanes` is 0, but must be a whole number from 1"):
            check_lanes(EngineOptions(lanes=0), device)
    for device in ("cpu", "mps", "xpu:0"):
        check_lanes(EngineOptions(), device)
