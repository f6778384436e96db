"""Artefacts whose weights are outside the file are refused before a runtime opens them."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from aoft_deploy.artefacts.engine import EngineOptions
from aoft_deploy.artefacts.registry import load_artefact, load_fleet
from aoft_deploy.cli.inspect import describe
from aoft_deploy.cli.predict import main as predict
from aoft_deploy.errors import ArtefactError
from aoft_deploy.fleet.fleet import Fleet

REFUSED = "keeps weights in other files: only single files are opened"

EXTERNAL_DATA: dict[str, Mapping[str, Any]] = {
    "beside": {"location": "weights.bin"},
    "above": {"location": "../outside/weights.bin"},
    "absolute": {"location": "{outside}/weights.bin"},
    "detour": {"location": "x/../../outside/weights.bin"},
    "environment": {"location": "/proc/self/environ", "offset": 0, "length": 4},
    "symlink": {"location": "link.bin"},
    "symlinked folder": {"location": "linked/weights.bin"},
    "hardlink": {"location": "hard.bin"},
    "offset below zero": {"location": "weights.bin", "offset": -8},
    "offset beyond the end": {"location": "weights.bin", "offset": 10**15},
    "length beyond the end": {"location": "weights.bin", "length": 10**15},
    "length below zero": {"location": "weights.bin", "length": -2},
    "memory": {"location": "*/_ORT_MEM_ADDR_/*", "offset": 4096, "length": 64},
    "missing": {"location": "missing.bin"},
    "empty": {"location": ""},
    "unnamed": {},
}


def with_external_data(artefact: Path, folder: Path, kind: str) -> Path:
    """Copy the artefact into a folder, with its largest weight as external data."""
    outside, inside = folder / "outside", folder / "inside"
    outside.mkdir()
    inside.mkdir()
    proto = onnx.load(artefact)
    tensor = max(proto.graph.initializer, key=lambda t: len(t.raw_data))
    for parent in (outside, inside):
        (parent / "weights.bin").write_bytes(tensor.raw_data)
    (inside / "link.bin").symlink_to(outside / "weights.bin")
    (inside / "linked").symlink_to(outside, target_is_directory=True)
    (inside / "hard.bin").hardlink_to(outside / "weights.bin")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in EXTERNAL_DATA[kind].items():
        tensor.external_data.add(key=key, value=str(value).format(outside=outside))
    path = inside / "task.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def test_onnx_runtime_itself_runs_a_model_with_external_data(
    artefact: Path, tmp_path: Path
) -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
    runtime: Any = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(with_external_data(artefact, tmp_path, "beside"))
    (logits,) = session.run(["logits"], {"pixel_values": x})
    np.testing.assert_array_equal(logits, load_artefact(artefact).run(x))


@pytest.mark.parametrize("kind", EXTERNAL_DATA)
def test_a_model_with_external_data_is_refused(
    kind: str,
    artefact: Path,
    photos: list[Path],
    tmp_path: Path,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = with_external_data(artefact, tmp_path, kind)
    monkeypatch.chdir(path.parent)
    assert REFUSED in refused(predict, path, photos[0])
    for given in (path, Path(path.name)):
        with pytest.raises(ArtefactError, match=REFUSED):
            load_artefact(given, EngineOptions(threads=1))
        with pytest.raises(ArtefactError, match=REFUSED):
            describe(given)


@pytest.mark.parametrize("kind", EXTERNAL_DATA)
def test_a_fleet_with_external_data_is_refused(
    kind: str, fleet_artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = with_external_data(fleet_artefact, tmp_path, kind)
    for folder in (path.parent, tmp_path / "outside"):
        monkeypatch.chdir(folder)  # external data of a model in memory is relative to this folder
        for load in (Fleet, load_fleet, load_artefact):
            with pytest.raises(ArtefactError, match=REFUSED):
                load(path)


def test_a_model_of_a_triton_repository_with_external_data_is_refused(
    artefact: Path, tmp_path: Path
) -> None:
    (tmp_path / "task" / "1").mkdir(parents=True)
    path = with_external_data(artefact, tmp_path, "beside")
    for file in ("task.onnx", "weights.bin"):
        os.replace(path.parent / file, tmp_path / "task" / "1" / file)
    (tmp_path / "task" / "1" / "task.onnx").rename(tmp_path / "task" / "1" / "model.onnx")
    (tmp_path / "task" / "config.pbtxt").write_text('backend: "onnxruntime"')
    for load in (load_artefact, describe):
        with pytest.raises(ArtefactError, match=REFUSED):
            load(tmp_path / "task")


def test_a_weight_in_the_file_that_also_refers_to_another_file_is_refused(
    artefact: Path, tmp_path: Path
) -> None:
    proto = onnx.load(artefact)
    proto.graph.initializer[0].external_data.add(key="location", value="weights.bin")
    (tmp_path / "a.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ArtefactError, match=REFUSED):
        load_artefact(tmp_path / "a.onnx")
