"""Where a fleet finds the tasks that are not in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from aoft_deploy.errors import CheckpointError
from aoft_deploy.fleet.checkpoint_folder import CheckpointFolder
from aoft_deploy.fleet.name_index import Names
from aoft_deploy.fleet.packed_tasks import PackedTasks
from aoft_deploy.fleet.task import TaskKind, TaskNumbers

__all__ = ["TaskStore", "open_store"]


class TaskStore(Protocol):
    """Tasks that can be read by name, from several threads at once."""

    @property
    def kind(self) -> TaskKind:
        """What all its tasks are."""
        ...

    @property
    def names(self) -> Names:
        """Names of all its tasks; may take a while."""
        ...

    def __contains__(self, name: str) -> bool:
        """Whether there is such a task; quick."""
        ...

    def read(self, name: str) -> TaskNumbers:
        """A task's numbers.

        Raises:
            UnknownNameError: There is no such task.
            CheckpointError: Its numbers cannot be had.
        """
        ...


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
