"""What an ONNX file takes: images in one of two forms and, for a fleet, a task for each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.inputs import check_batch
from aoft_deploy.errors import ArtefactError
from aoft_exporters.graph.fleet_tables import fleet_logits

__all__ = ["OnnxFile", "OnnxInputs"]


@dataclass(frozen=True)
class OnnxInputs:
    """The inputs of a file.

    Attributes:
        name: Name of the images: ``pixel_values`` or ``image``.
        dtype: Their type, float32 or uint8.
        shape: Shape of one image; None stands for any length.
        tasks: Number of tasks of a fleet; None for a single task.
    """

    name: str
    dtype: type[Any]
    shape: tuple[int | None, ...]
    tasks: int | None

    @classmethod
    def of(cls, session: Any, info: Mapping[str, str], path: Path) -> OnnxInputs:
        """The inputs of an open session.

        Args:
            session: The session.
            info: Metadata of the file.
            path: The file that error messages name.

        Raises:
            ArtefactError: The file is a fleet and does not name its tasks.
        """
        images = session.get_inputs()[0]
        takes_tasks = any(value.name == "task" for value in session.get_inputs())
        return cls(
            str(images.name),
            np.uint8 if images.type == "tensor(uint8)" else np.float32,
            tuple(side if isinstance(side, int) else None for side in images.shape[1:]),
            _task_count(info, path) if takes_tasks else None,
        )

    def rows(self) -> dict[str, tuple[type[Any], tuple[int, ...]]]:
        """Type and shape of one row of each input, by name.

        Raises:
            ArtefactError: The file takes images of any size.
        """
        shape = tuple(side for side in self.shape if side is not None)
        if len(shape) < len(self.shape):
            raise ArtefactError(
                "An ONNX file for a GPU states the size of its images: export it with aoft-export."
            )
        task: dict[str, tuple[type[Any], tuple[int, ...]]] = {"task": (np.int64, ())}
        return {self.name: (self.dtype, shape)} | ({} if self.tasks is None else task)

    def feed(
        self, images: NDArray[Any], task: NDArray[np.int64] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Arrays by the names of the inputs."""
        return {self.name: images} | ({} if task is None else {"task": np.asarray(task, np.int64)})

    def check(self, images: NDArray[Any], task: NDArray[np.int64] | None) -> None:
        """Check that the file takes a batch; see ``check_batch``."""
        check_batch(images, task, takes=(self.dtype, self.shape), tasks=self.tasks)


class OnnxFile:
    """An open ONNX file, on a CPU or a GPU.

    Attributes:
        info: Metadata of the file.
    """

    info: Mapping[str, str]
    _inputs: OnnxInputs

    @property
    def takes_pixels(self) -> bool:
        """Whether the input is uint8 [batch, H, W, 3]."""
        return bool(self._inputs.dtype is np.uint8)

    @property
    def takes_tasks(self) -> bool:
        """Whether the file is a fleet, which needs a task for each image."""
        return self._inputs.tasks is not None

    def run(
        self, images: NDArray[Any], task: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Logits of a batch in the file's input form; see ``Engine``.

        Raises:
            AoftError: The GPU failed.
        """
        self._inputs.check(images, task)
        if task is not None:
            return fleet_logits(self._run, images, task, self.info)
        return self._run(images)

    def _run(
        self, images: NDArray[Any], task: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Logits of a checked batch, of a folded fleet for one task at a time."""
        raise NotImplementedError


def _task_count(info: Mapping[str, str], path: Path) -> int:
    try:
        return len(json.loads(info.get("tasks", "[]")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ArtefactError(f"{path} does not name its tasks ({error}).") from error
