"""The replicas of a fleet have the same tasks at every moment."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aoft_deploy.errors import CheckpointError, SettingError, UnknownNameError
from aoft_deploy.fleet.fleet import Fleet
from aoft_deploy.fleet.replicas import FleetReplicas

IMAGES = np.random.default_rng(9).normal(size=(2, 3, 16, 16)).astype(np.float32)


@pytest.fixture
def replicas(fleet_artefact: Path) -> FleetReplicas:
    return FleetReplicas([Fleet(fleet_artefact, threads=1) for _ in range(3)])


def logits(fleet: Fleet, name: str) -> Any:
    return np.stack([answer.logits for answer in fleet.predict(IMAGES, [name] * len(IMAGES))])


def expected(fleet_artefact: Path, checkpoint: Path) -> Any:
    """Logits of a fleet that was made for one task alone."""
    fleet = Fleet(fleet_artefact, threads=1)
    fleet.add(checkpoint, "the task")
    return logits(fleet, "the task")


def test_a_task_is_added_to_replaced_on_and_removed_from_all_replicas(
    replicas: FleetReplicas, fleet_artefact: Path, fleet_tasks: dict[str, Path]
) -> None:
    for source in ("zürich", "two words"):
        replicas.add(fleet_tasks[source], "new")
        wanted = expected(fleet_artefact, fleet_tasks[source])
        for fleet in replicas.fleets:
            np.testing.assert_array_equal(logits(fleet, "new"), wanted)
    assert "new" in replicas and replicas.names == {"pets", "birds", "new"}
    assert replicas.tasks.keys() == replicas.names
    assert replicas.classes("new") == replicas.fleets[2].classes("new")
    replicas.remove("new")
    assert "new" not in replicas and all("new" not in fleet for fleet in replicas.fleets)
    with pytest.raises(UnknownNameError, match="new"):
        replicas.remove("new")


def test_a_task_of_some_replicas_alone_has_no_name(
    replicas: FleetReplicas, fleet_tasks: dict[str, Path]
) -> None:
    replicas.fleets[0].add(fleet_tasks["zürich"], "new")
    assert "new" not in replicas and "new" not in replicas.names and "new" not in replicas.tasks
    replicas.remove("new")
    assert "new" not in replicas.fleets[0]


@pytest.mark.parametrize("full", [0, 1, 2])
def test_a_replica_without_room_leaves_all_of_them_unchanged(
    full: int, fleet_artefact: Path, fleet_tasks: dict[str, Path]
) -> None:
    whole = Fleet(fleet_artefact, threads=1)
    task = whole.residency.bytes // 2
    fleets = [
        Fleet(fleet_artefact, threads=1, budget=(3 if i == full else 5) * task) for i in range(3)
    ]
    replicas = FleetReplicas(fleets)
    replicas.add(fleet_tasks["zürich"], "new")
    before = [(fleet.names, fleet.residency.bytes) for fleet in fleets]
    with pytest.raises(SettingError, match="leave no room for it in a `budget`"):
        replicas.add(fleet_tasks["two words"], "new")  # both versions need room for a moment
    assert [(fleet.names, fleet.residency.bytes) for fleet in fleets] == before
    wanted = expected(fleet_artefact, fleet_tasks["zürich"])
    for fleet in fleets:
        np.testing.assert_array_equal(logits(fleet, "new"), wanted)


def test_a_faulty_checkpoint_changes_no_replica(
    replicas: FleetReplicas, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "junk.ckpt").write_bytes(b"junk")
    for path in (checkpoint, tmp_path / "junk.ckpt"):  # of another method; no checkpoint
        with pytest.raises(CheckpointError):
            replicas.add(path, "new")
    assert replicas.names == {"pets", "birds"}


def test_all_replicas_get_the_version_that_was_read_once(
    replicas: FleetReplicas,
    fleet_artefact: Path,
    fleet_tasks: dict[str, Path],
    tmp_path: Path,
) -> None:
    """The file is replaced after the first replica has written the task."""
    path = tmp_path / "new.ckpt"
    path.write_bytes(fleet_tasks["zürich"].read_bytes())
    first: Any = replicas.fleets[0]
    staged: Callable[..., Any] = first.staged

    def replaced(task: Any) -> Any:
        path.write_bytes(fleet_tasks["two words"].read_bytes())
        return staged(task)

    first.staged = replaced
    replicas.add(path, "new")
    wanted = expected(fleet_artefact, fleet_tasks["zürich"])
    for fleet in replicas.fleets:
        np.testing.assert_array_equal(logits(fleet, "new"), wanted)


def test_replicas_agree_after_changes_at_the_same_time(
    replicas: FleetReplicas, fleet_tasks: dict[str, Path]
) -> None:
    start = threading.Barrier(4)

    def change(turn: int) -> None:
        start.wait()
        for i in range(20):
            path = list(fleet_tasks.values())[(turn + i) % 4]
            replicas.add(path, "new")

    threads = [threading.Thread(target=change, args=(turn,)) for turn in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = logits(replicas.fleets[0], "new")
    for fleet in replicas.fleets[1:]:
        np.testing.assert_array_equal(logits(fleet, "new"), wanted)
        assert fleet.residency.bytes == replicas.fleets[0].residency.bytes
