"""What a demo shows: one fleet, its tasks, and the checkpoints that they came from."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from aoft_deploy.checkpoints.names import task_name
from aoft_deploy.errors import CheckpointError
from aoft_deploy.files import file_digest
from aoft_deploy.fleet.fleet import Fleet

__all__ = [
    "BUNDLED",
    "Stage",
    "Task",
    "bundled_checkpoints",
    "checkpoint_of",
    "open_stage",
    "task_bytes",
]

BUNDLED = Path(__file__).parents[1] / "bundled"
"""The offline tasks' checkpoints and pictures, made by tools/demo_tasks.py."""


PACKAGES = ("aoft-deploy", "numpy", "onnx", "onnxruntime", "timm", "torch")
"""What a fleet's file depends on beside its checkpoints."""


def bundled_checkpoints() -> list[Path]:
    """Checkpoints of the tasks that ship with the demo."""
    return sorted(BUNDLED.glob("*.ckpt"))


@dataclass(frozen=True)
class Task:
    """A task as someone sees it.

    Attributes:
        key: What the fleet calls it.
        classes: Names of its classes, in the order of its logits.
        checkpoint: Its model.ckpt; None if it came inside a fleet's file alone.
        origin: ``given`` at the start, ``added`` or ``trained`` by a visitor.
    """

    key: str
    classes: tuple[str, ...]
    checkpoint: Path | None
    origin: str = "given"


@dataclass(frozen=True)
class Stage:
    """The fleet that all visitors share, and what it began with.

    Attributes:
        fleet: Answers for everybody.
        tasks: Those that every visitor begins with, by name.
        backbone: timm name and further arguments of the backbone, as ``Backbone.to_dict`` has it.
        backbone_bytes: What the weights take that all tasks share.
        weights: File with the backbone's weights; None takes timm's own.
        folder: For temporary files; whoever opened the stage removes it.
        examples: Pictures to begin with.
    """

    fleet: Fleet
    tasks: Mapping[str, Task]
    backbone: Mapping[str, Any]
    backbone_bytes: int
    weights: Path | None
    folder: Path
    examples: Sequence[Path]


def open_stage(
    paths: Sequence[Path],
    folder: Path,
    *,
    weights: Path | None = None,
    examples: Sequence[Path] | None = None,
    threads: int | None = None,
) -> Stage:
    """Open a fleet with tasks.

    Args:
        paths: A fleet's file, checkpoints, or both: then a checkpoint gives the fleet's task of its
            name what the fleet's file lacks, or adds one. None at all: the bundled tasks.
        folder: For temporary files.
        weights: File with the backbone's weights; None takes timm's own.
        examples: Pictures to offer; None takes the bundled ones.
        threads: Of the runtime; None lets it choose.

    Raises:
        AoftError: A file that is neither, several fleets, or tasks that cannot share a fleet.
    """
    fleets = [path for path in paths if path.suffix in (".onnx", ".xml") or path.is_dir()]
    checkpoints = [path for path in paths if path not in fleets]
    for path in paths:
        if not path.exists():
            raise CheckpointError(f"There is no file {path}.")
    if len(fleets) > 1:
        raise CheckpointError(
            f"{fleets[0]} and {fleets[1]} are two artefacts: give one fleet, and checkpoints."
        )
    if not paths:
        checkpoints = bundled_checkpoints()
    artefact = fleets[0] if fleets else _exported(checkpoints, folder, weights)
    fleet = Fleet(artefact, threads=threads)
    inside = sum(task_bytes(fleet, classes) for classes in fleet.tasks.values())
    found = dict(zip(_names(checkpoints), checkpoints, strict=True))
    for name, path in found.items():
        if name not in fleet.tasks:
            fleet.add(path, name)
    _warm_up(fleet)
    tasks = {name: Task(name, classes, found.get(name)) for name, classes in fleet.tasks.items()}
    size = artefact.stat().st_size if artefact.is_file() else _folder_size(artefact)
    pictures = sorted(BUNDLED.glob("*.png")) if examples is None else list(examples)
    return Stage(
        fleet, tasks, _backbone(artefact), max(size - inside, 0), weights, folder, pictures
    )


def _warm_up(fleet: Fleet) -> None:
    """The first pass takes its memory; nobody should see that in a time."""
    size, names = fleet.preprocessing.size, list(fleet.tasks)[:8]
    for count in (1, len(names)):
        fleet.predict(np.zeros((count, 3, size, size), np.float32), names[:count])


def task_bytes(fleet: Fleet, classes: Sequence[str]) -> int:
    """What a task's numbers take in memory: its updates, and weight and bias of each class."""
    return 4 * (fleet.kind.row_length + len(classes) * (fleet.kind.width + 1))


def _folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _names(checkpoints: Sequence[Path]) -> list[str]:
    names = [task_name(path) for path in checkpoints]
    for name in names:
        if names.count(name) > 1:
            raise CheckpointError(f"Two tasks are called {name!r}: rename one's file or folder.")
    return names


def _manifest(artefact: Path) -> Path:
    return artefact.with_name(f"{artefact.name}.json")


def _backbone(artefact: Path) -> Mapping[str, Any]:
    """The backbone's name from the manifest; empty where there is none."""
    try:
        found = json.loads(_manifest(artefact).read_text("utf-8"))["backbone"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _exported(checkpoints: Sequence[Path], folder: Path, weights: Path | None) -> Path:
    """The fleet of some checkpoints, from the cache where it was exported before."""
    cache = _cache_folder()
    target = (cache or folder) / f"{_digest(checkpoints, weights)}.onnx"
    if not (target.is_file() and _manifest(target).is_file()):
        from aoft_deploy.export.fleet import export_fleet  # which needs torch, the fleet does not

        export_fleet(checkpoints, target, weights=weights, command=["aoft-demo"])
    return target


def _cache_folder() -> Path | None:
    """Where fleets are kept between starts; None where AOFT_CACHE_DIR is empty."""
    named = os.environ.get("AOFT_CACHE_DIR")
    if named == "":
        return None
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aoft-deploy"
    folder = Path(named or default) / "demo"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return None


def _digest(checkpoints: Sequence[Path], weights: Path | None) -> str:
    """Of all that decides the fleet's file."""
    for path in checkpoints:
        if not path.is_file():
            raise CheckpointError(f"{path} is no checkpoint and no fleet of aoft-export.")
    parts = [f"{task_name(path)} {file_digest(path)}" for path in checkpoints]
    parts += [file_digest(weights)] if weights else []
    parts += [f"{package} {version(package)}" for package in PACKAGES]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def checkpoint_of(task: Task, name: str) -> Path:
    """The file that a task came from.

    Raises:
        CheckpointError: It came inside a fleet's file alone.
    """
    if task.checkpoint is None:
        raise CheckpointError(
            f"Task {name!r} came inside the fleet's file, without its checkpoint: add its "
            "model.ckpt on the tab Swap, or give it to aoft-demo."
        )
    return task.checkpoint
