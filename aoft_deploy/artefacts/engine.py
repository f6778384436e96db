"""Engines, which are loaded artefacts that compute logits, and the options to load them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from aoft_deploy.errors import SettingError
from aoft_deploy.processors import limited, processors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from aoft_deploy.artefacts.table_memory import TableMemory

__all__ = [
    "DeviceTimer",
    "Engine",
    "EngineOptions",
    "FleetEngine",
    "FleetTables",
]


@dataclass(frozen=True)
class EngineOptions:
    """How to run an artefact. There are no fallbacks: an option that cannot be met is an error.

    Attributes:
        engine: Name of the runtime; None means the one that verified the artefact.
        threads: CPU threads for one batch; None lets the runtime choose, or shares the processors
            among several lanes.
        device: ``cpu``, ``cuda``, ``cuda:1`` …; None lets the engine choose.
        lanes: Batches that the device computes at once. On a GPU, each lane has its own buffers and
            stream; on a CPU, its own threads, as far as the runtime keeps them apart.

    Raises:
        SettingError: There is not one lane or more.
    """

    engine: str | None = None
    threads: int | None = None
    device: str | None = None
    lanes: int = 1

    def __post_init__(self) -> None:
        if self.lanes < 1:
            raise SettingError(f"`lanes` is {self.lanes}, but must be a whole number from 1.")

    def cpu_threads(self) -> int | None:
        """CPU threads for one batch; None lets the runtime choose, as it may use every core."""
        if self.threads is not None or self.lanes == 1:
            return self.threads or limited()
        return max(1, processors() // self.lanes)


class Engine(Protocol):
    """A loaded artefact. ``run`` is thread-safe."""

    @property
    def info(self) -> Mapping[str, str]:
        """Metadata stored in the artefact; ``ArtefactInfo`` gives typed access."""

    @property
    def takes_pixels(self) -> bool:
        """Whether inputs are uint8 pixels instead of normalised float32."""

    @property
    def takes_tasks(self) -> bool:
        """Whether the artefact is a fleet, which needs a task for each image."""

    @property
    def device(self) -> str:
        """Device that runs the artefact, such as ``cpu`` or ``cuda:0``."""

    def run(
        self, images: NDArray[Any], task: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Compute the logits of a batch.

        Args:
            images: float32 [batch, 3, H, W], or uint8 [batch, H, W, 3] if ``takes_pixels``.
            task: For a fleet, the index of each image's task, int64 [batch].

        Returns:
            float32 [batch, classes]; for a fleet, −inf beyond the classes of an image's task.

        Raises:
            SettingError: The images have the wrong type or shape, tasks are missing for a fleet or
                given for a single task, or a task index is out of range.
        """


@runtime_checkable
class DeviceTimer(Protocol):
    """An engine on a GPU that measures the GPU's part of a run."""

    def device_seconds(self, images: NDArray[Any], task: NDArray[np.int64] | None = None) -> float:
        """Seconds between CUDA events around the copies and kernels of a batch.

        Args:
            images: As for ``Engine.run``.
            task: As for ``Engine.run``.
        """


@dataclass(frozen=True, eq=False)
class FleetTables:
    """The parameters of a fleet's tasks, in the order of the arguments of ``MixedModel.forward``.

    Tables in memory that an engine reserved are in the form that this memory gives them.

    Attributes:
        bank: Parameters of the updates, float32 (tasks, parameters).
        heads: Classifier rows of all tasks, weights and bias, float32 (rows, width + 1).
        first: Index of the first classifier row of each task, int64 (tasks,).
        count: Number of classes of each task, int64 (tasks,).
        columns: 0 … columns − 1 of the logits, int64 (columns,).
    """

    bank: NDArray[Any]
    heads: NDArray[Any]
    first: NDArray[Any]
    count: NDArray[Any]
    columns: NDArray[Any]

    def by_name(self) -> dict[str, NDArray[Any]]:
        """The arrays, not copied, by the names of the graph's inputs."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class FleetEngine(Protocol):
    """A loaded fleet that takes the tables of its tasks as arguments.

    Attributes:
        tables: The tables stored in the artefact.
    """

    tables: FleetTables | None

    @property
    def info(self) -> Mapping[str, str]:
        """Metadata stored in the artefact."""

    def capacity(self) -> int:
        """Bytes that the parameters of tasks may take if the caller sets no limit."""

    def reserve(self, size: int) -> TableMemory:
        """Reserve memory for tables, where the engine reads them in place.

        Args:
            size: Bytes that are needed.

        Raises:
            SettingError: The device has less.
        """

    def run(
        self, images: NDArray[np.float32], task: NDArray[np.int64], tables: FleetTables
    ) -> NDArray[np.float32]:
        """Compute the logits of a batch, with −inf beyond the classes of an image's task.

        Args:
            images: float32 [batch, 3, H, W], normalised.
            task: Row of each image's task in the tables, int64 [batch].
            tables: Parameters of the tasks: arrays of this process, or tables of reserved memory.
                They are not copied.

        Returns:
            float32 [batch, columns].
        """
