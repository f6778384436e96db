"""A live fleet: many tasks on one graph and one backbone, added and removed while requests run.

The graph that ``export_fleet`` writes takes the parameters of all tasks as input tables. The
runtime reads these tables in place, from this process's memory or from the GPU's: adding a task
writes one row, removing it frees the row, and a request selects its row by index. A store on disk
may hold more tasks than fit into memory. Needs neither torch nor timm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.description import ArtefactInfo
from aoft_deploy.artefacts.engine import EngineOptions, FleetTables
from aoft_deploy.artefacts.manifest import unchanged
from aoft_deploy.artefacts.registry import load_fleet
from aoft_deploy.checkpoints.names import task_name
from aoft_deploy.classes import Answer, Classes
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import ArtefactError, SettingError
from aoft_deploy.fleet.opening import open_store
from aoft_deploy.fleet.resident_tasks import ResidentTasks
from aoft_deploy.fleet.slots import Residency
from aoft_deploy.fleet.store import TaskStore
from aoft_deploy.fleet.tables import TaskTables
from aoft_deploy.fleet.task import TaskKind, TaskParameters, read_task

__all__ = ["Fleet", "TaskAnswer"]


class TaskAnswer(NamedTuple):
    """A task's answer for one image; both fields belong to the same version of the task.

    Attributes:
        logits: (classes,).
        classes: Names of the classes, in the order of the logits; they turn logits into answers.
    """

    logits: NDArray[np.float32]
    classes: Classes

    def answers(self, top: int | None = None, *, usual: int = 1) -> list[Answer]:
        """Predictions, best first, or values; arguments as for ``Classes.answers``."""
        return self.classes.answers(self.logits[None], top, usual=usual)[0]


class Fleet:
    """Many tasks on one backbone; each image of a batch is classified by its own task.

    All methods are thread-safe. A request sees one version of each task that was current at some
    moment of the request. A request that begins after ``remove`` returns never sees the removed
    task.

    Tasks of the store are read on demand, and the least recently used of them are evicted when the
    budget is full. The artefact's own tasks and added tasks stay until they are removed, and take
    precedence over the store's tasks of the same names.

    Attributes:
        kind: What its tasks share: backbone, method, settings, preprocessing.
        preprocessing: How an image becomes a row of ``pixel_values``, the same for all tasks.

    Args:
        path: The artefact that ``export_fleet`` wrote; its tasks are available from the start.
        store: More tasks: a folder of checkpoints, a file from ``pack``, or any ``TaskStore``.
        budget: Bytes of memory that the parameters of tasks may take. On a CPU, they are taken when
            tasks are added and returned when they are removed; None allows the machine's memory. On
            a GPU, they are taken at once, and half as many for gaps between classifiers; None takes
            a third of the memory that nothing but fleets of this process uses, and at most half of
            what is free.
        threads: As for ``EngineOptions``.
        device: ``cpu``, ``cuda``, ``cuda:1`` …; None lets the engine choose.
        lanes: Batches that the device computes at once.

    Raises:
        ArtefactError: The file is missing, damaged or no fleet.
        CheckpointError: The store cannot be used or is of another kind.
        SettingError: The artefact's own tasks exceed the budget, the budget exceeds the device's
            memory, or the artefact does not run on the device.
    """

    def __init__(
        self,
        path: Path,
        *,
        store: Path | str | TaskStore | None = None,
        budget: int | None = None,
        threads: int | None = None,
        device: str | None = None,
        lanes: int = 1,
    ) -> None:
        options = EngineOptions(threads=threads, device=device, lanes=lanes)
        self._engine = load_fleet(Path(path), options)
        tables, self._engine.tables = self._engine.tables, None
        assert tables is not None
        try:
            described = ArtefactInfo(self._engine.info, str(path)).tasks
            self.kind = TaskKind.of_fleet(self._engine.info, tables.heads.shape[1] - 1)
            ends = tables.first + tables.count
            heads = [tables.heads[i:j] for i, j in zip(tables.first, ends, strict=True)]
            parameters = map(TaskParameters, tables.bank, heads, described.values())
            own = list(zip(described, parameters, strict=True))
        except ArtefactError:
            raise
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ArtefactError(f"{path} is no fleet of aoft-export ({error}).") from error
        for name, task in own:
            self.kind.check_parameters(name, task)
        self.preprocessing = Preprocessing.from_dict(self.kind.preprocessing)
        if isinstance(store, str | Path):
            store = open_store(Path(store), self.kind)
        elif store is not None:
            self.kind.check_kind(store, store.kind)
        budget = self._engine.capacity() if budget is None else budget
        row_length, width = self.kind.row_length, self.kind.width
        self._tables = TaskTables(row_length, width, budget, self._engine.reserve)
        self._tasks = ResidentTasks(self._tables, store, own)

    @property
    def tasks(self) -> dict[str, Classes]:
        """Names of the tasks in memory and their classes."""
        return self._tasks.resident

    @property
    def names(self) -> set[str]:
        """Names of all tasks, in memory and in the store; may be slow."""
        return self._tasks.names

    def __contains__(self, name: str) -> bool:
        """Whether there is a task of that name, in memory or in the store; fast."""
        return name in self._tasks

    @property
    def residency(self) -> Residency:
        """How many tasks are in memory, and how often requests found theirs there."""
        return self._tasks.residency

    def classes(self, name: str) -> Classes:
        """Classes of a task in memory or in the store, in the order of its logits.

        Raises:
            UnknownNameError: There is no such task.
            CheckpointError: The store cannot read the task.
        """
        return self._tasks.classes(name)

    def add(self, checkpoint: Path | str, name: str | None = None, *, replace: bool = False) -> str:
        """Add a task from its ``model.ckpt``; it stays in memory until it is removed.

        Args:
            checkpoint: Trained on the fleet's backbone, with its method, settings and
                preprocessing.
            name: The task's name; None takes the file's name, or its folder's for ``model.ckpt``.
            replace: Whether it may replace a task of that name. The replacement is atomic: each
                request uses either the old or the new version.

        Returns:
            The task's name.

        Raises:
            CheckpointError: The file is damaged, does not belong to this fleet, or was changed
                while it was read.
            SettingError: A task of that name exists, in memory or in the store, or the tasks added
                leave no room for it in the budget.
        """
        name = task_name(Path(checkpoint)) if name is None else name
        self._tasks.add(name, self.read(checkpoint), replace=replace)
        return name

    def read(self, checkpoint: Path | str) -> TaskParameters:
        """Read a task of this fleet's kind from its ``model.ckpt``, without adding it.

        Raises:
            CheckpointError: The file is damaged, does not belong to this fleet, or was changed
                while it was read.
        """
        path = Path(checkpoint)
        with unchanged(path):
            return read_task(path, self.kind)

    def staged(self, task: TaskParameters) -> AbstractContextManager[Callable[[str, bool], None]]:
        """Context manager: hold a task that ``read`` returned in memory, without a name.

        Yields:
            Function that gives the task a name, and may replace a task of that name if its second
            argument is true. Without this call, the memory is returned at the end.

        Raises:
            SettingError: The tasks added leave no room for it in the budget.
        """
        return self._tasks.staged(task)

    def remove(self, name: str) -> None:
        """Remove a task. Its memory is reused once the requests that hold it have ended.

        A task of the store stays in the store, but this fleet no longer serves it.

        Raises:
            UnknownNameError: There is no such task.
        """
        self._tasks.remove(name)

    def prefetch(self, names: Sequence[str]) -> None:
        """Read tasks into memory before requests need them.

        Args:
            names: Names of tasks. If the budget has no room for all of them, the last ones stay.

        Raises:
            UnknownNameError: There is no such task.
            CheckpointError: The store cannot read a task.
            SettingError: The tasks added leave no room for one of the store.
        """
        remaining = list(dict.fromkeys(names))
        while remaining:
            with self._tasks.holding(remaining) as held:
                remaining = [name for name in remaining if name not in held]

    def predict(
        self, images: NDArray[np.float32], tasks: Sequence[str], *, rows: int | None = None
    ) -> list[TaskAnswer]:
        """Classify each image by its own task.

        All images of a task are classified by one version of it, also if it is replaced meanwhile.
        If a batch has more tasks than there is room for beside those of other requests, it runs in
        parts.

        Args:
            images: Normalised, float32 (batch, 3, H, W).
            tasks: Name of each image's task.
            rows: Maximum number of images that the engine computes at once; None: all.

        Returns:
            Logits and classes for each image.

        Raises:
            UnknownNameError: There is no such task, or it was removed before it was read.
            CheckpointError: The store cannot read a task.
            SettingError: The images have a wrong shape or do not match the tasks in number, or the
                tasks added leave no room for one of the store.
        """
        shape = (len(tasks), 3, self.preprocessing.height, self.preprocessing.width)
        if images.shape != shape:
            raise SettingError(
                f"Images of shape {images.shape} for {len(tasks)} tasks: give {shape}."
            )
        answers: dict[int, TaskAnswer] = {}
        names = list(dict.fromkeys(tasks))
        while names:
            with self._tasks.holding(names) as held:
                part = [i for i, name in enumerate(tasks) if name in held]
                for start in range(0, len(part), rows or len(part)):
                    chosen = part[start : start + (rows or len(part))]
                    logits = self._logits(images, chosen, [held[tasks[i]].slot for i in chosen])
                    for i, row in zip(chosen, logits, strict=True):
                        classes = held[tasks[i]].classes
                        answers[i] = TaskAnswer(row[: len(classes)], classes)
            names = [name for name in names if name not in held]
        return [answers[i] for i in range(len(tasks))]

    def _logits(
        self, images: NDArray[np.float32], chosen: list[int], slots: list[int]
    ) -> NDArray[np.float32]:
        """Logits of the chosen images by the tasks in these slots, −inf beyond their classes."""
        batch = images if len(chosen) == len(images) else images[chosen]
        task = np.array(slots, np.int64)
        columns = np.arange(self._tables.count[task].max(), dtype=np.int64)
        tables = FleetTables(**self._tables.arrays, columns=columns)
        logits: NDArray[np.float32] = self._engine.run(batch, task, tables)
        return logits
