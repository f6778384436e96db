"""A folder of checkpoints as a task store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from aoft_deploy.errors import CheckpointError, SettingError, UnknownNameError
from aoft_deploy.fleet.name_index import NameIndex
from aoft_deploy.fleet.task import TaskKind, TaskParameters, read_task

__all__ = ["CheckpointFolder"]


class CheckpointFolder:
    """The checkpoints ``NAME.ckpt`` and ``NAME/model.ckpt`` of a folder.

    Opening reads no file. Each task is read when it is requested, and checkpoints that are added
    to the folder later are found at once.

    Attributes:
        path: The folder.
        kind: The kind that its tasks must have.

    Args:
        path: As the attribute.
        kind: As the attribute, such as ``Fleet.kind``.

    Raises:
        CheckpointError: The folder does not exist.
    """

    def __init__(self, path: Path, kind: TaskKind) -> None:
        self.path, self.kind = Path(path), kind
        if not self.path.is_dir():
            raise CheckpointError(f"There is no folder {path}.")

    @property
    def names(self) -> NameIndex:
        """Names of the tasks that are in the folder now.

        Raises:
            SettingError: Two checkpoints have the same task name.
        """
        return NameIndex.of(self._list())

    def __contains__(self, name: str) -> bool:
        return bool(self._find(name))

    def read(self, name: str) -> TaskParameters:
        """Read a task's parameters.

        Raises:
            UnknownNameError: There is no such task.
            SettingError: Two checkpoints have this task name.
            CheckpointError: The file is damaged or of another kind.
        """
        found = self._find(name)
        if not found:
            raise UnknownNameError("task", name, self.names.closest(name))
        if len(found) > 1:
            raise SettingError(f"Two tasks are called {name!r}, {found[0]} and {found[1]}.")
        return read_task(found[0], self.kind)

    def _find(self, name: str) -> list[Path]:
        """The files of a task; none if the name would lead out of the folder."""
        if name in ("", ".", "..") or {"/", "\0", os.sep} & set(name):
            return []
        candidates = [self.path / name / "model.ckpt"]
        if name != "model":
            candidates.insert(0, self.path / f"{name}.ckpt")
        # os.path.isfile also accepts names that are too long for the file system.
        return [path for path in candidates if os.path.isfile(path)]

    def _list(self) -> Iterator[str]:
        with os.scandir(self.path) as entries:
            for entry in entries:
                if entry.name.endswith(".ckpt") and entry.name != "model.ckpt" and entry.is_file():
                    yield entry.name.removesuffix(".ckpt")
                elif entry.is_dir() and os.path.isfile(os.path.join(entry.path, "model.ckpt")):
                    yield entry.name
