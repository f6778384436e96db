"""The fleet that all sessions share: the bundled tasks, given artefacts, and the cache."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from aoft_demo.actions.verification import verify
from aoft_demo.tasks.session_registry import SessionRegistry
from aoft_demo.tasks.shared_fleet import (
    SharedFleet,
    bundled_checkpoints,
    open_shared_fleet,
    task_bytes,
)
from aoft_demo.tasks.skills import bundled_examples, bundled_skills
from aoft_deploy.errors import ArtefactError, CheckpointError


def test_every_skill_is_bundled_as_a_small_checkpoint(shared: SharedFleet) -> None:
    assert sorted(shared.tasks) == sorted(bundled_skills())
    assert all(path.stat().st_size < 60_000 for path in bundled_checkpoints())
    assert list(shared.examples) == [example.file for example in bundled_examples()]


def test_a_second_start_takes_the_fleet_from_the_cache(shared: SharedFleet, tmp_path: Path) -> None:
    again = open_shared_fleet([], tmp_path, threads=1)
    assert again.tasks == shared.tasks
    assert not any(tmp_path.iterdir())
    cache = Path(os.environ["AOFT_CACHE_DIR"], "demo")
    assert len(list(cache.glob("*.onnx"))) >= 1


def test_without_a_cache_the_fleet_is_a_temporary_file(
    fleet_tasks: dict[str, Path],
    backbone_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AOFT_CACHE_DIR", "")
    open_shared_fleet([fleet_tasks["pets"]], tmp_path, weights=backbone_weights, threads=1)
    assert len(list(tmp_path.glob("*.onnx"))) == 1


def test_sizes_agree_with_the_memory_that_the_fleet_reports(shared: SharedFleet) -> None:
    own = sum(task_bytes(shared.fleet, task.classes) for task in shared.tasks.values())
    assert own <= shared.fleet.residency.bytes <= own + 64 * len(shared.tasks)
    assert shared.backbone_bytes == pytest.approx(4 * 2_719_296, rel=0.02)
    assert shared.backbone["name"] == "aoft_vit_nano"


def test_the_size_of_the_backbone_does_not_depend_on_added_checkpoints(
    fleet_artefact: Path, fleet_tasks: dict[str, Path], tmp_path: Path
) -> None:
    alone = open_shared_fleet([fleet_artefact], tmp_path, threads=1)
    more = open_shared_fleet([fleet_artefact, *fleet_tasks.values()], tmp_path, threads=1)
    assert len(more.tasks) == len(alone.tasks) + 2
    assert more.backbone_bytes == alone.backbone_bytes
    inside = sum(task_bytes(alone.fleet, classes) for classes in alone.fleet.tasks.values())
    assert alone.backbone_bytes == fleet_artefact.stat().st_size - inside > 0


def test_checkpoints_extend_a_fleet_from_a_file(
    fleet_artefact: Path, fleet_tasks: dict[str, Path], tmp_path: Path
) -> None:
    checkpoints = [fleet_tasks["pets"], fleet_tasks["zürich"]]
    shared = open_shared_fleet([fleet_artefact, *checkpoints], tmp_path)
    assert list(shared.tasks) == ["pets", "birds", "zürich"]
    assert shared.tasks["pets"].checkpoint == fleet_tasks["pets"]
    assert shared.tasks["birds"].checkpoint is None
    session = SessionRegistry(shared).get("a session")
    with pytest.raises(
        CheckpointError, match="The fleet's file has task 'birds', but not its checkpoint"
    ):
        verify(session, "birds", bundled_examples()[0].file)


def test_unusable_paths_are_refused(
    fleet_artefact: Path, artefact: Path, tmp_path: Path, fleet_tasks: dict[str, Path]
) -> None:
    with pytest.raises(CheckpointError, match=r"There is no file .*nothing\.ckpt"):
        open_shared_fleet([tmp_path / "nothing.ckpt"], tmp_path)
    with pytest.raises(CheckpointError, match="are two artefacts"):
        open_shared_fleet([fleet_artefact, artefact], tmp_path)
    with pytest.raises(ArtefactError, match="no fleet"):
        open_shared_fleet([artefact], tmp_path)
    twin = tmp_path / "pets.ckpt"
    shutil.copyfile(fleet_tasks["pets"], twin)
    with pytest.raises(CheckpointError, match="Two tasks are called 'pets'"):
        open_shared_fleet([fleet_artefact, fleet_tasks["pets"], twin], tmp_path)
    odd = tmp_path / "odd.ckpt"
    odd.write_bytes(b"odd")
    with pytest.raises(CheckpointError, match=r"odd\.ckpt"):
        open_shared_fleet([odd], tmp_path)
