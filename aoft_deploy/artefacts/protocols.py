"""What exporters and engines look like from outside, and where they are found.

Exporters are found by the entry-point group ``aoft_deploy.exporters`` and never imported by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from os.path import isfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.manifest import check_unchanged, unchanged
from aoft_deploy.errors import CheckpointError, SettingError, UnknownNameError

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
    "Recipe",
    "TunedExporter",
    "check_batch",
    "exporter_names",
    "get_exporter",
    "load_artefact",
    "load_fleet",
]

GROUP = "aoft_deploy.exporters"


@dataclass(frozen=True)
class Recipe:
    """What an exporter needs to know beside the model.

    Attributes:
        size: Side of the square input, in pixels.
        uint8: Whether the artefact takes pixels, uint8 [batch, H, W, 3], instead of normalised
            float32 [batch, 3, H, W].
        mean: Mean of each channel, on the scale 0..1.
        std: Standard deviation of each channel, on the scale 0..1.
        metadata: Text values to store in the artefact where the format can.
        precision: One of the exporter's ``PRECISIONS``.
        calibration: Images to learn ranges of activations from, uint8 [n, H, W, 3]; None where the
            exporter learns none.
        batches: Smallest, usual and largest batch, for artefacts that are built for a range.
        compute_capability: Of the GPU that the artefact is for, such as ``8.9``; None is this
            machine's.
        refittable: Whether the artefact may be given other weights later.
        refit: An artefact of the same graph to give these weights to, instead of building.
        opset: Of ONNX; None is the exporter's own choice.
        min_agreement: Share of ``calibration`` that must keep its top class, for exporters that
            can give up some speed for it.
        judged: Images that answers below fp32 are judged on, uint8 [n, H, W, 3]: an exporter keeps
            in float32 what leaves the precision's range on them. None where nothing is judged.
    """

    size: int
    uint8: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    metadata: Mapping[str, str]
    precision: str = "fp32"
    calibration: NDArray[np.uint8] | None = field(default=None, repr=False, compare=False)
    batches: tuple[int, int, int] = (1, 8, 32)
    compute_capability: str | None = None
    refittable: bool = False
    refit: Path | None = None
    opset: int | None = None
    min_agreement: float = 0.0
    judged: NDArray[np.uint8] | None = field(default=None, repr=False, compare=False)


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


def exporter_names() -> tuple[str, ...]:
    """Names of the installed exporters, sorted."""
    return tuple(sorted(entry.name for entry in entry_points(group=GROUP)))


def get_exporter(name: str) -> Exporter:
    """The exporter called ``name``.

    Raises:
        UnknownNameError: No installed exporter has that name.
    """
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            return cast(Exporter, entry.load())
    raise UnknownNameError("exporter", name, exporter_names())


def load_artefact(
    path: Path,
    *,
    engine: str | None = None,
    threads: int | None = None,
    device: str | None = None,
) -> Engine:
    """An engine for an exported artefact: a file by its suffix, a folder by what it holds.

    Nothing falls back: what was asked for runs, or the error says what it lacks.

    Args:
        path: What aoft-export wrote.
        engine: Which runtime; None is the one that the artefact was verified with.
        threads: Threads within a batch on a CPU; None lets the runtime choose.
        device: ``cpu``, ``cuda``, ``cuda:1`` …; None is the engine's own choice.

    Raises:
        CheckpointError: No exporter writes such files or folders, or this one is damaged, not the
            one that the manifest beside it is of, or written while it is opened.
        UnknownNameError: The engine does not run such artefacts.
        SettingError: The engine cannot run this artefact, or not on that device.
        MissingExtraError: The runtime is not installed.
    """
    exporter = _exporter_of(path)
    if exporter is None:
        raise CheckpointError(
            f"{path} is no artefact of aoft-export: export a checkpoint with aoft-export --merge "
            "first."
        )
    if engine is not None and engine not in exporter.ENGINES:
        raise UnknownNameError(f"engine for {path.name}", engine, exporter.ENGINES)
    with unchanged(path):
        check_unchanged(path)
        return exporter.load(path, engine=engine, threads=threads, device=device)


def _exporter_of(path: Path) -> Exporter | None:
    """The exporter that writes such files or folders."""
    for entry in entry_points(group=GROUP):
        exporter = cast(Exporter, entry.load())
        marked = isinstance(exporter, FolderExporter) and isfile(path / exporter.MARKER)
        if path.suffix == exporter.SUFFIX or marked:
            return exporter
    return None


def load_fleet(path: Path, *, threads: int | None = None) -> Any:
    """A fleet whose caller has the tasks' tables.

    It has ``info``, ``tables`` and ``run(images, task, tables)``.

    Raises:
        CheckpointError: The artefact is no fleet, or of a kind whose tasks cannot change.
    """
    exporter: Any = _exporter_of(path)
    if not hasattr(exporter, "load_fleet"):
        raise CheckpointError(
            f"{path} is no fleet whose tasks can change: export one with aoft-export --fleet --to "
            "onnx or openvino."
        )
    with unchanged(path):
        check_unchanged(path)
        return exporter.load_fleet(path, threads=threads)


def check_batch(
    images: NDArray[Any],
    task: NDArray[np.int64] | None,
    *,
    takes: tuple[Any, tuple[int | None, ...]],
    tasks: int | None,
) -> None:
    """Whether a batch is what an artefact takes.

    Args:
        images: The batch.
        task: A task for each image.
        takes: Type of the images, and their shape without the batch; None where any length goes.
        tasks: How many the artefact has; None if it is a single model.

    Raises:
        SettingError: It is not.
    """
    dtype, shape = np.dtype(takes[0]), takes[1]
    fits = len(images.shape) == len(shape) + 1 and all(
        theirs in (None, ours) for ours, theirs in zip(images.shape[1:], shape, strict=True)
    )
    if images.dtype != dtype or not fits or not len(images):
        sides = ", ".join("any" if side is None else str(side) for side in shape)
        raise SettingError(
            f"This artefact takes {dtype} [batch, {sides}], but got {images.dtype} "
            f"{list(images.shape)}."
        )
    if (task is not None) is not (tasks is not None):
        missing = "needs a task for each image" if tasks is not None else "holds a single task"
        raise SettingError(f"This artefact {missing}.")
    if task is None or tasks is None:
        return
    if len(task) != len(images) or ((task < 0) | (task >= tasks)).any():
        raise SettingError(
            f"Tasks {task.tolist()[:8]} for {len(images)} images: give one from 0 to {tasks - 1} "
            "for each."
        )
