from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aoft_deploy.artefacts.engine import EngineOptions
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


@pytest.mark.parametrize("lanes", [0, -1])
def test_there_is_one_lane_or_more(lanes: int) -> None:
    with pytest.raises(SettingError, match=f"`lanes` is {lanes}, but must be a whole number from"):
        EngineOptions(lanes=lanes)


@pytest.mark.parametrize(
    ("options", "threads"),
    [
        (EngineOptions(), None),
        (EngineOptions(lanes=2), 3),
        (EngineOptions(lanes=4), 1),
        (EngineOptions(lanes=9), 1),
        (EngineOptions(threads=2, lanes=4), 2),
    ],
)
def test_lanes_share_the_processors(
    options: EngineOptions, threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aoft_deploy.artefacts.engine.processors", lambda: 6)
    monkeypatch.setattr("aoft_deploy.artefacts.engine.limited", lambda: None)
    assert options.cpu_threads() == threads
    monkeypatch.setattr("aoft_deploy.artefacts.engine.limited", lambda: 6)
    assert options.cpu_threads() == (threads or 6)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_several_lanes_of_a_cpu_have_their_own_threads_and_the_same_answers(
    engine: str, artefact: Path
) -> None:
    images = np.random.default_rng(0).standard_normal((3, 3, 16, 16), np.float32)
    alone = load_artefact(artefact, EngineOptions(engine, threads=1)).run(images)
    several: Any = load_artefact(artefact, EngineOptions(engine, threads=1, lanes=2))
    with ThreadPoolExecutor(4) as pool:
        for answer in pool.map(lambda _: several.run(images), range(8)):
            assert np.array_equal(answer, alone)
    if engine == "openvino":
        assert int(several._compiled.property("NUM_STREAMS")) == 2
        assert several.threads == 2
    else:
        assert several._session.get_session_options().intra_op_num_threads == 1
