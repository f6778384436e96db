"""Opening a task store from a path."""

from __future__ import annotations

from pathlib import Path

from aoft_deploy.errors import CheckpointError
from aoft_deploy.fleet.checkpoint_folder import CheckpointFolder
from aoft_deploy.fleet.packed_tasks import PackedTasks
from aoft_deploy.fleet.store import TaskStore
from aoft_deploy.fleet.task import TaskKind

__all__ = ["open_store"]


def open_store(path: Path, kind: TaskKind) -> TaskStore:
    """Open a folder of checkpoints, or a file that ``pack`` wrote.

    Args:
        path: The folder or file.
        kind: The kind that the tasks must have.

    Raises:
        CheckpointError: The path does not exist, or the file cannot be used.
    """
    if path.is_dir():
        return CheckpointFolder(path, kind)
    if path.is_file():
        return PackedTasks(path, kind)
    raise CheckpointError(f"There is no folder of checkpoints or file of packed tasks {path}.")
