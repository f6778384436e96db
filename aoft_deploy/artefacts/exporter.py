"""What an exporter is: one kind of artefact, how it is written, opened and described."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aoft_deploy.artefacts.engine import Engine, EngineOptions, FleetEngine, FleetTables
from aoft_deploy.artefacts.spec import ExportSpec

if TYPE_CHECKING:
    from aoft_deploy.tuning.multitask import FleetModel

__all__ = ["DeviceSupport", "Emulation", "Exporter", "FleetSupport", "UpdateSupport"]


@dataclass(frozen=True)
class FleetSupport:
    """How an exporter writes fleets.

    Attributes:
        forms: Forms of a fleet that its artefacts can run, ``mixed`` first.
        export: Writes a fleet's model with the tables of its tasks to a path.
        load: Opens a fleet whose tasks may change, with a number of threads (None lets the runtime
            choose); None where the tasks are fixed.
    """

    forms: tuple[str, ...]
    export: Callable[[FleetModel, Path, ExportSpec, FleetTables], None]
    load: Callable[[Path, int | None], FleetEngine] | None = None


@dataclass(frozen=True)
class Emulation:
    """Precisions that no runtime on the CPU computes in.

    Attributes:
        precisions: Their names.
        load: Opens an artefact such that every result is rounded to its precision.
    """

    precisions: tuple[str, ...]
    load: Callable[[Path], Engine]


@dataclass(frozen=True)
class DeviceSupport:
    """Artefacts that run on a device that this machine may lack.

    Attributes:
        intermediate: File in the artefact with the graph it was built from; it is deleted after
            verification.
        name: Name of the device that an artefact runs on here; None if there is none.
        load_intermediate: Opens the graph on the CPU.
    """

    intermediate: str
    name: Callable[[Path], str | None]
    load_intermediate: Callable[[Path], Engine]


@dataclass(frozen=True)
class UpdateSupport:
    """Artefacts that hold a task's updates alone: ``export`` takes the tuned model, not merged.

    Attributes:
        load: Opens an artefact on its backbone, whose weights are those of a file, or timm's own
            where the second argument is None.
    """

    load: Callable[[Path, Path | None], Engine]


@dataclass(frozen=True)
class Exporter:
    """One kind of artefact. An entry point of ``aoft_deploy.exporters`` names such a value.

    Attributes:
        name: As in ``to``; the name of the entry point.
        suffix: Of its files or folders.
        precisions: Those it can write, ``fp32`` first.
        engines: Runtimes of its artefacts; the first verifies them.
        tolerance: Largest difference to the unmerged model's logits at fp32, for logits up to 1.
        export: Writes a model to a path.
        load: Opens an artefact. Raises ``ArtefactError`` where it is missing or damaged,
            ``SettingError`` where the engine or device cannot run it, and ``MissingExtraError``
            where the runtime is not installed.
        describe: What an artefact holds, as JSON values, without opening it in a runtime: ``kind``,
            then its own entries. None where the file was not written by this exporter.
        platform: Name in the Open Inference Protocol.
        marker: File that every such folder holds, and no other folder; empty for single files.
        calibrated: Those of its precisions that need ``ExportSpec.calibration``.
        opsets: ONNX opsets it can write, its own choice first.
        ranged: Whether artefacts are built for a range of batch sizes.
        fleet: How it writes fleets; None where it cannot.
        emulation: Precisions that are verified by emulation; None where there are none.
        device: The device that artefacts are built for; None is the CPU.
        updates: Set where artefacts hold the updates alone; None where they hold a whole model.
    """

    name: str
    suffix: str
    precisions: tuple[str, ...]
    engines: tuple[str, ...]
    tolerance: float
    export: Callable[[Any, Path, ExportSpec], None]
    load: Callable[[Path, EngineOptions], Engine]
    describe: Callable[[Path], dict[str, Any] | None]
    platform: str
    marker: str = ""
    calibrated: tuple[str, ...] = ()
    opsets: tuple[int, ...] = ()
    ranged: bool = False
    fleet: FleetSupport | None = None
    emulation: Emulation | None = None
    device: DeviceSupport | None = None
    updates: UpdateSupport | None = None

    def owns(self, path: Path) -> bool:
        """Whether a path looks like its artefact, by suffix or by the marker in a folder."""
        return path.suffix == self.suffix or bool(self.marker and (path / self.marker).is_file())

    def emulates(self, precision: str) -> bool:
        """Whether artefacts of a precision are verified by emulation."""
        return self.emulation is not None and precision in self.emulation.precisions

    def device_name(self, artefact: Path, precision: str) -> str | None:
        """Device on which this machine runs an artefact in its own precision; None if on none."""
        if self.emulates(precision):
            return None
        return self.device.name(artefact) if self.device else "CPU"
