"""What exporters and engines look like from outside, and where they are found.

Exporters are found by the entry-point group ``aoft_deploy.exporters`` and never imported by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.spec import Recipe

if TYPE_CHECKING:
    from torch import nn

    from aoft_deploy.tuning.multitask import FleetModel

__all__ = [
    "CalibratedExporter",
    "DeviceExporter",
    "EmulatedExporter",
    "Engine",
    "Exporter",
    "FleetExporter",
    "FolderExporter",
    "OpsetExporter",
    "RangedExporter",
    "TunedExporter",
]


class Engine(Protocol):
    """A loaded artefact. Many threads may call ``run`` at once."""

    @property
    def info(self) -> Mapping[str, str]:
        """Metadata stored in the artefact."""

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
            SettingError: The images are of another type or shape, or a fleet is run without tasks,
                a single model with them, or a task is outside the fleet.
        """


class Exporter(Protocol):
    """A module that writes and runs one kind of artefact.

    Attributes:
        SUFFIX: Of its files.
        TOLERANCE: Largest difference to the unmerged model's logits at fp32, for logits up to 1.
        PRECISIONS: Those it can write, ``fp32`` first.
        ENGINES: Those that can run its artefacts; the first is the one they are verified with.
    """

    SUFFIX: str
    TOLERANCE: float
    PRECISIONS: tuple[str, ...]
    ENGINES: tuple[str, ...]

    def export(self, model: nn.Module, path: Path, recipe: Recipe) -> None:
        """Write ``model`` to ``path``."""

    def load(
        self,
        path: Path,
        *,
        engine: str | None = None,
        threads: int | None = None,
        device: str | None = None,
    ) -> Engine:
        """Open the artefact at ``path``.

        Args:
            path: What ``export`` wrote.
            engine: One of ``ENGINES``; None is the first.
            threads: Threads within a batch on a CPU; None lets the runtime choose.
            device: ``cpu``, ``cuda``, ``cuda:1`` …; None is the engine's own choice.

        Raises:
            CheckpointError: The artefact is missing or damaged.
            SettingError: The engine or the device cannot run it.
            MissingExtraError: The runtime is not installed.
        """


@runtime_checkable
class FolderExporter(Exporter, Protocol):
    """An exporter whose artefacts are folders, of any name.

    Attributes:
        MARKER: A file that every such folder holds, and no other folder.
    """

    MARKER: str


@runtime_checkable
class CalibratedExporter(Exporter, Protocol):
    """An exporter that learns ranges of activations from images.

    Attributes:
        CALIBRATED: Those of its ``PRECISIONS`` that need ``Recipe.calibration``.
    """

    CALIBRATED: tuple[str, ...]


@runtime_checkable
class OpsetExporter(Exporter, Protocol):
    """An exporter of ONNX graphs.

    Attributes:
        OPSETS: Those it can state a graph in, its own choice first.
    """

    OPSETS: tuple[int, ...]


@runtime_checkable
class FleetExporter(Exporter, Protocol):
    """An exporter that writes fleets too.

    Attributes:
        FORMS: Those of a fleet's forms that its artefacts can run, ``mixed`` first.
    """

    FORMS: tuple[str, ...]

    def export_fleet(
        self, model: FleetModel, path: Path, recipe: Recipe, tables: Mapping[str, NDArray[Any]]
    ) -> None:
        """Write a fleet's model with the tables of its tasks to ``path``."""


@runtime_checkable
class RangedExporter(Exporter, Protocol):
    """An exporter whose artefacts are for a range of batches.

    Attributes:
        RANGED: True.
    """

    RANGED: bool


@runtime_checkable
class DeviceExporter(FolderExporter, Protocol):
    """An exporter whose artefacts run on a device that this machine may lack.

    Attributes:
        BETWEEN: A file in the artefact that ``stand_in`` reads; it goes once that is verified.
    """

    BETWEEN: str

    def device(self, path: Path) -> str | None:
        """Name of the device that the artefact at ``path`` runs on here; None if on none."""

    def stand_in(self, path: Path) -> Engine:
        """The graph that the artefact at ``path`` was built from, run on the CPU."""


@runtime_checkable
class EmulatedExporter(Exporter, Protocol):
    """An exporter of precisions that no runtime on the CPU computes in.

    Attributes:
        EMULATED: Those of its ``PRECISIONS``.
    """

    EMULATED: tuple[str, ...]

    def emulation(self, path: Path) -> Engine:
        """What the artefact at ``path`` answers where every result is rounded to its precision."""


@runtime_checkable
class TunedExporter(Exporter, Protocol):
    """An exporter of the updates alone: its ``export`` takes the model before any merge.

    Attributes:
        TAKES: ``"tuned"``.
    """

    TAKES: str

    def load(
        self,
        path: Path,
        *,
        engine: str | None = None,
        threads: int | None = None,
        device: str | None = None,
        weights: Path | None = None,
    ) -> Engine:
        """Open the artefact at ``path`` on its backbone, whose weights are a file's or timm's."""
