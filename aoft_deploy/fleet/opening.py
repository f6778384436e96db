"""A task store by what its path is: a folder of checkpoints, or a packed file."""

from __future__ import annotations

from pathlib import Path

from aoft_deploy.errors import CheckpointError
from aoft_deploy.fleet.checkpoint_folder import CheckpointFolder
from aoft_deploy.fleet.packed_tasks import PackedTasks
from aoft_deploy.fleet.store import TaskStore
from aoft_deploy.fleet.task import TaskKind

__all__ = ["open_store"]


def open_store(path: Path, kind: TaskKind) -> TaskStore:
    """A folder of checkpoints, or a file that ``pack`` wrote.

    Args:
        path: Folder or file.
        kind: What the tasks must be.

    Raises:
        CheckpointError: There is neither, or the file cannot be used.
    """
    if path.is_dir():
        return CheckpointFolder(path, kind)
    if path.is_file():
        return PackedTasks(path, kind)
    raise CheckpointError(f"There is no folder of checkpoints or file of packed tasks {path}.")
