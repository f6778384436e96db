"""Where a fleet finds the tasks that are not in memory."""

from __future__ import annotations

from typing import Protocol

from aoft_deploy.fleet.name_index import NameIndex
from aoft_deploy.fleet.task import TaskKind, TaskParameters

__all__ = ["TaskStore"]


class TaskStore(Protocol):
    """Tasks that can be read by name, from several threads at once."""

    @property
    def kind(self) -> TaskKind:
        """What all its tasks are."""
        ...

    @property
    def names(self) -> NameIndex:
        """Names of all its tasks; may take a while."""
        ...

    def __contains__(self, name: str) -> bool:
        """Whether there is such a task; quick."""
        ...

    def read(self, name: str) -> TaskParameters:
        """A task's numbers.

        Raises:
            UnknownNameError: There is no such task.
            CheckpointError: Its numbers cannot be had.
        """
        ...
