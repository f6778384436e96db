"""The fleet that all sessions share, and the tasks that it starts with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aoft_demo.tasks.fleet_export import export_cached
from aoft_demo.tasks.skills import bundled_examples, bundled_skills
from aoft_deploy.artefacts.manifest import artefact_files, manifest_path
from aoft_deploy.artefacts.spec import InputSpec
from aoft_deploy.checkpoints.names import task_name
from aoft_deploy.classes import Classes
from aoft_deploy.errors import CheckpointError
from aoft_deploy.fleet.fleet import Fleet
from aoft_deploy.path_kinds import CHECKPOINT, missing
from aoft_deploy.processors import processors

__all__ = [
    "BUNDLED",
    "SharedFleet",
    "Task",
    "bundled_checkpoints",
    "checkpoint_of",
    "open_shared_fleet",
    "task_bytes",
]

BUNDLED = Path(__file__).parents[1] / "bundled"
"""Checkpoints and pictures of the bundled tasks; tools/demo_skills.py makes them."""


@dataclass(frozen=True)
class Task:
    """A task of a session.

    Attributes:
        key: The task's name in the fleet.
        classes: Names of the classes, in the order of the logits.
        checkpoint: The task's model.ckpt; None if only the fleet's file has the task.
        origin: ``initial`` if the demo started with it, else ``added`` or ``trained``.
    """

    key: str
    classes: Classes
    checkpoint: Path | None
    origin: str = "initial"


@dataclass(frozen=True)
class SharedFleet:
    """The fleet that all sessions share.

    Attributes:
        fleet: The running fleet; it also holds the tasks that sessions add.
        tasks: The tasks that every session starts with, by name.
        backbone: The backbone's timm name and arguments, as in ``Backbone.to_dict``; empty if the
            fleet has no manifest.
        backbone_bytes: Size of the weights that all tasks share.
        weights: File with the backbone's weights; None takes timm's own.
        folder: Folder for temporary files; the caller of ``open_shared_fleet`` removes it.
        examples: Example pictures.
        threads: Threads of the runtime.
        difference: Largest difference of a logit between the fleet and the unmerged models when it
            was exported; None if the fleet has no manifest.
    """

    fleet: Fleet
    tasks: Mapping[str, Task]
    backbone: Mapping[str, Any]
    backbone_bytes: int
    weights: Path | None
    folder: Path
    examples: Sequence[Path]
    threads: int
    difference: float | None = None


def open_shared_fleet(
    paths: Sequence[Path],
    folder: Path,
    *,
    weights: Path | None = None,
    examples: Sequence[Path] | None = None,
    threads: int | None = None,
) -> SharedFleet:
    """Open a fleet with its tasks.

    Args:
        paths: A fleet, checkpoints, or both; empty takes the bundled tasks. With both, a checkpoint
            adds a task to the fleet, or belongs to the fleet's task of the same name.
        folder: Folder for temporary files.
        weights: File with the backbone's weights; None takes timm's own.
        examples: Example pictures; None takes the bundled ones.
        threads: Threads of the runtime; None takes all processors.

    Raises:
        AoftError: A path is neither a fleet nor a checkpoint, there are several fleets, or the
            tasks cannot share one.
    """
    for path in paths:
        if not path.exists():
            raise CheckpointError(missing(path))
    paths = [path / CHECKPOINT if (path / CHECKPOINT).is_file() else path for path in paths]
    fleets = [path for path in paths if path.suffix in (".onnx", ".xml") or path.is_dir()]
    checkpoints = [path for path in paths if path not in fleets]
    if len(fleets) > 1:
        raise CheckpointError(
            f"{fleets[0]} and {fleets[1]} are two artefacts: give one fleet, and checkpoints."
        )
    if not paths:
        checkpoints = bundled_checkpoints()
    artefact = fleets[0] if fleets else export_cached(checkpoints, folder, weights)
    threads = processors() if threads is None else threads
    fleet = Fleet(artefact, threads=threads)
    tasks_in_file = sum(task_bytes(fleet, classes) for classes in fleet.tasks.values())
    by_name = _by_name(checkpoints)
    for name, path in by_name.items():
        if name not in fleet.tasks:
            fleet.add(path, name)
    _warm_up(fleet)
    manifest = _manifest(artefact)
    return SharedFleet(
        fleet=fleet,
        tasks={
            name: Task(name, classes, by_name.get(name)) for name, classes in fleet.tasks.items()
        },
        backbone=manifest.get("backbone", {}),
        backbone_bytes=max(_size(artefact) - tasks_in_file, 0),
        weights=weights,
        folder=folder,
        examples=[e.file for e in bundled_examples()] if examples is None else list(examples),
        difference=manifest.get("verification", {}).get("max_abs"),
        threads=threads,
    )


def bundled_checkpoints() -> list[Path]:
    """Checkpoints of the tasks that ship with the demo, in the order of their cards."""
    return [BUNDLED / f"{name}.ckpt" for name in bundled_skills()]


def task_bytes(fleet: Fleet, classes: Sequence[str]) -> int:
    """Memory of a task in bytes: its updates, and weight and bias of each class, in float32."""
    return 4 * (fleet.kind.row_length + len(classes) * (fleet.kind.width + 1))


def checkpoint_of(task: Task, name: str) -> Path:
    """The checkpoint of a task.

    Args:
        task: The task.
        name: The task's name in the session, for the message.

    Raises:
        CheckpointError: Only the fleet's file has the task.
    """
    if task.checkpoint is None:
        raise CheckpointError(
            f"The fleet's file has task {name!r}, but not its checkpoint: add its model.ckpt on "
            "the tab Skills, or start aoft-demo with it."
        )
    return task.checkpoint


def _by_name(checkpoints: Sequence[Path]) -> dict[str, Path]:
    """Checkpoints by the names of their tasks."""
    names = [task_name(path) for path in checkpoints]
    for name in names:
        if names.count(name) > 1:
            raise CheckpointError(f"Two tasks are called {name!r}: rename a file or its folder.")
    return dict(zip(names, checkpoints, strict=True))


def _warm_up(fleet: Fleet) -> None:
    """Run the fleet once: the first run allocates memory, and should not be the one measured."""
    images, names = InputSpec.of(fleet.preprocessing), list(fleet.tasks)[:8]
    for count in (1, len(names)):
        fleet.predict(images.zeros(count), names[:count])


def _manifest(artefact: Path) -> dict[str, Any]:
    """The objects in the artefact's manifest by name; empty if there is no manifest."""
    try:
        manifest = json.loads(manifest_path(artefact).read_text("utf-8"))
        return {name: value for name, value in manifest.items() if isinstance(value, dict)}
    except (OSError, ValueError, AttributeError):
        return {}


def _size(artefact: Path) -> int:
    return sum(file.stat().st_size for file in artefact_files(artefact))
