"""Engines: loaded artefacts that compute logits, and the options to open one with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Engine", "EngineOptions", "FleetEngine", "FleetTables"]


@dataclass(frozen=True)
class EngineOptions:
    """How an artefact is run. Nothing falls back: an option that cannot be met is an error.

    Attributes:
        engine: Name of the runtime; None is the one that the artefact was verified with.
        threads: Threads within a batch on a CPU; None lets the runtime choose.
        device: ``cpu``, ``cuda``, ``cuda:1`` …; None is the engine's own choice.
    """

    engine: str | None = None
    threads: int | None = None
    device: str | None = None


class Engine(Protocol):
    """A loaded artefact. Many threads may call ``run`` at once."""

    @property
    def info(self) -> Mapping[str, str]:
        """Metadata stored in the artefact; ``ArtefactInfo`` reads them."""

    @property
    def takes_pixels(self) -> bool:
        """Whether inputs are uint8 pixels instead of normalised float32."""

    @property
    def takes_tasks(self) -> bool:
        """Whether the artefact is a fleet, which needs a task for each image."""

    @property
    def device(self) -> str:
        """Where it computes, such as ``cpu`` or ``cuda:0``."""

    def run(
        self, images: NDArray[Any], task: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Logits of a batch of inputs in the artefact's own form.

        Args:
            images: float32 [batch, 3, H, W], or uint8 [batch, H, W, 3] if it takes pixels.
            task: A fleet's task for each image, int64 [batch].

        Returns:
            (batch, classes); of a fleet −inf beyond each task's own classes.

        Raises:
            SettingError: The images have another type or shape, a fleet is run without tasks, a
                single model with them, or a task is outside the fleet.
        """


@dataclass(frozen=True, eq=False)
class FleetTables:
    """The parameters of a fleet's tasks, in the order of ``MixedModel.forward``.

    Attributes:
        bank: The updates' parameters, float32 (tasks, parameters).
        heads: Classifier rows of all tasks, weights and bias, float32 (rows, width + 1).
        first: Index of each task's first classifier row, int64 (tasks,).
        count: Number of each task's classes, int64 (tasks,).
        columns: 0 … columns − 1 of the logits, int64 (columns,).
    """

    bank: NDArray[Any]
    heads: NDArray[Any]
    first: NDArray[Any]
    count: NDArray[Any]
    columns: NDArray[Any]

    def by_name(self) -> dict[str, NDArray[Any]]:
        """The arrays by the names of the graph's inputs; they are not copied."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class FleetEngine(Protocol):
    """A loaded fleet that reads the tasks' tables from the caller's memory.

    Attributes:
        tables: The tables of the tasks that the artefact holds.
    """

    tables: FleetTables | None

    @property
    def info(self) -> Mapping[str, str]:
        """Metadata stored in the artefact."""

    def run(
        self, images: NDArray[np.float32], task: NDArray[np.int64], tables: FleetTables
    ) -> NDArray[np.float32]:
        """Logits, (batch, columns), −inf beyond each task's own classes.

        Args:
            images: float32 [batch, 3, H, W], normalised.
            task: Row of each image's task in the tables, int64 [batch].
            tables: They are not copied.
        """
