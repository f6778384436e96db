"""The command's paths are checked before anything heavy is imported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from imported import heavy_libraries

from aoft_demo.tasks.formats import check_paths
from aoft_deploy.errors import CheckpointError


def test_fleets_and_checkpoints_pass(
    fleet_artefact: Path, fleet_tasks: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    shutil.copyfile(fleet_tasks["pets"], tmp_path / "run" / "model.ckpt")
    check_paths([fleet_artefact, fleet_tasks["pets"], tmp_path / "run"])


def test_a_merged_model_names_the_checkpoint_to_give(artefact: Path, tmp_path: Path) -> None:
    merged = tmp_path / artefact.name
    shutil.copyfile(artefact, merged)
    manifest = json.loads((artefact.parent / f"{artefact.name}.json").read_text())
    manifest["checkpoint"] = {"name": "pets.ckpt", "sha256": "0"}
    (tmp_path / f"{artefact.name}.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"no fleet: give the pets\.ckpt that it was made"):
        check_paths([merged])
    for name in ("model.ckpt", merged.with_suffix(".ckpt").name, "pets.ckpt"):
        (tmp_path / name).write_bytes(b"")  # each one is preferred to those before
        with pytest.raises(CheckpointError, match=f"the checkpoint beside it, .*{name}"):
            check_paths([merged])


def test_other_paths_are_refused_by_their_format(tmp_path: Path) -> None:
    for name, content, message in (
        ("picture.png", b"\x89PNG\r\n", "give a model.ckpt"),
        ("notes.md", b"text", "is a text"),
        ("model.onnx", b"<!doctype html>", "HTML page"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            check_paths([tmp_path / name])
    with pytest.raises(CheckpointError, match="There is no file"):
        check_paths([tmp_path / "nothing.ckpt"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is an empty folder"):
        check_paths([tmp_path / "empty"])


def test_the_check_imports_no_heavy_library(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("text")
    run = "from aoft_demo.cli import main\nassert main([sys.argv[1]]) == 1"
    assert heavy_libraries(run, tmp_path / "notes.md") == set()
