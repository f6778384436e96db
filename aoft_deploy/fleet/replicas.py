"""One fleet on several devices, each with its own tables."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from aoft_deploy.classes import Classes
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import UnknownNameError
from aoft_deploy.fleet.fleet import Fleet

__all__ = ["FleetReplicas"]


class FleetReplicas:
    """Replicas of one fleet whose tasks change together. All methods are thread-safe.

    A task has a name only if every replica has it. A task is written to all replicas before it gets
    its name on any of them, so a replica without room for it leaves all of them unchanged. Each
    request runs on one replica, and so sees one version of a task.

    Attributes:
        fleets: The replicas.

    Args:
        fleets: Fleets of one artefact and one store, one on each device.
    """

    def __init__(self, fleets: Sequence[Fleet]) -> None:
        self.fleets = tuple(fleets)
        self._lock = threading.Lock()  # names change in the same order on all replicas

    @property
    def preprocessing(self) -> Preprocessing:
        """How an image becomes a row of ``pixel_values``, the same for all tasks."""
        return self.fleets[0].preprocessing

    @property
    def tasks(self) -> dict[str, Classes]:
        """Names of the tasks in the first replica's memory and their classes."""
        return {name: own for name, own in self.fleets[0].tasks.items() if name in self}

    @property
    def names(self) -> set[str]:
        """Names of all tasks, in memory and in the store; may be slow."""
        return set.intersection(*(fleet.names for fleet in self.fleets))

    def __contains__(self, name: str) -> bool:
        """Whether there is a task of that name, in memory or in the store; fast."""
        return all(name in fleet for fleet in self.fleets)

    def classes(self, name: str) -> Classes:
        """Classes of a task in memory or in the store, in the order of its logits.

        Raises:
            UnknownNameError: There is no such task.
            CheckpointError: The store cannot read the task.
        """
        return self.fleets[0].classes(name)

    def add(self, checkpoint: Path, name: str) -> None:
        """Add a task from its ``model.ckpt``; it replaces the task of this name.

        Args:
            checkpoint: As for ``Fleet.add``.
            name: The task's name.

        Raises:
            CheckpointError: The file is damaged, does not belong to this fleet, or was changed
                while it was read.
            SettingError: The tasks added leave no room for it in a replica's budget. No replica has
                changed.
        """
        task = self.fleets[0].read(checkpoint)
        with ExitStack() as stack:
            everywhere = [stack.enter_context(fleet.staged(task)) for fleet in self.fleets]
            with self._lock:
                for publish in everywhere:
                    publish(name, True)

    def remove(self, name: str) -> None:
        """Remove a task from all replicas, as ``Fleet.remove`` does.

        Raises:
            UnknownNameError: No replica has such a task.
        """
        unknown = []
        with self._lock:
            for fleet in self.fleets:
                try:
                    fleet.remove(name)
                except UnknownNameError as error:
                    unknown.append(error)
        if len(unknown) == len(self.fleets):
            raise unknown[0]
