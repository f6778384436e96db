"""The interface of a task store, from which a fleet reads tasks that are not in memory."""

from __future__ import annotations

from typing import Protocol

from aoft_deploy.fleet.name_index import NameIndex
from aoft_deploy.fleet.task import TaskKind, TaskParameters

__all__ = ["TaskStore"]


class TaskStore(Protocol):
    """Tasks that can be read by name, from several threads at once."""

    @property
    def kind(self) -> TaskKind:
        """The kind of all its tasks."""
        ...

    @property
    def names(self) -> NameIndex:
        """Names of all its tasks; may be slow."""
        ...

    def __contains__(self, name: str) -> bool:
        """Whether the store has a task of that name; fast."""
        ...

    def read(self, name: str) -> TaskParameters:
        """Read a task's parameters.

        Raises:
            UnknownNameError: The store has no such task.
            CheckpointError: The parameters cannot be read.
        """
        ...
