"""Interface of exporters. An exporter writes, loads and describes one kind of artefact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aoft_deploy.artefacts.engine import Engine, EngineOptions, FleetEngine, FleetTables
from aoft_deploy.artefacts.gpu_peaks import gpu_name
from aoft_deploy.artefacts.spec import ExportSpec

if TYPE_CHECKING:
    from aoft_deploy.tuning.multitask import FleetModel

__all__ = [
    "DeviceSupport",
    "Emulation",
    "Exporter",
    "FleetSupport",
    "FloatLayers",
    "UpdateSupport",
]


@dataclass(frozen=True)
class FleetSupport:
    """How an exporter writes and loads fleets.

    Attributes:
        forms: Supported forms of a fleet, ``mixed`` first.
        export: Writes the model of a fleet and the tables of its tasks to a path.
        load: Loads a fleet whose tasks can change. Raises as ``Exporter.load`` does. None if the
            tasks are fixed.
    """

    forms: tuple[str, ...]
    export: Callable[[FleetModel, Path, ExportSpec, FleetTables], None]
    load: Callable[[Path, EngineOptions], FleetEngine] | None = None


@dataclass(frozen=True)
class Emulation:
    """Emulation of precisions in which no CPU runtime computes.

    Attributes:
        precisions: Names of the emulated precisions.
        load: Loads an artefact so that every value is rounded as in its precision.
        gpu_only: Those precisions whose artefacts no runtime loads on a CPU.
    """

    precisions: tuple[str, ...]
    load: Callable[[Path], Engine]
    gpu_only: tuple[str, ...] = ()


@dataclass(frozen=True)
class DeviceSupport:
    """Verification of artefacts for a device that this machine may lack.

    Attributes:
        intermediate: File in the artefact: the graph from which the artefact was built. It is
            deleted before the artefact is published.
        name: Name of this machine's device that can run an artefact; None if there is none.
        load_intermediate: Loads the graph on the CPU.
    """

    intermediate: str
    name: Callable[[Path], str | None]
    load_intermediate: Callable[[Path], Engine]


@dataclass(frozen=True)
class FloatLayers:
    """Layers that a quantised artefact leaves in float, and the precision they are computed in.

    The artefact states it. It is ``fp32`` when the artefact is written, and may become ``lower``,
    which is faster, if the answers hold in both. A machine without ``lower`` computes in ``fp32``.

    Attributes:
        precisions: Precisions of artefacts that leave layers in float.
        lower: Name of the lower precision, such as ``bf16``.
        is_faster: Whether ``lower`` is faster on this machine, by the model's FLOPs per image.
        state: Writes the precision of the layers into an artefact.
    """

    precisions: tuple[str, ...]
    lower: str
    is_faster: Callable[[int], bool]
    state: Callable[[Path, str], None]


@dataclass(frozen=True)
class UpdateSupport:
    """Artefacts that hold only a task's updates: ``export`` takes the unmerged model.

    Attributes:
        load: Loads an artefact onto its backbone. The second argument is a file with the
            backbone's weights; None means timm's weights.
    """

    load: Callable[[Path, Path | None], Engine]


@dataclass(frozen=True)
class Exporter:
    """One kind of artefact. Each entry point of ``aoft_deploy.exporters`` refers to an instance.

    Attributes:
        name: Name of the exporter and of its entry point; the value of ``to``.
        suffix: Suffix of the artefact's file or folder.
        precisions: Supported precisions, ``fp32`` first.
        engines: Runtimes that can run the artefacts. The first one verifies them.
        tolerance: At fp32, the largest allowed difference to the unmerged model's logits, for
            logits up to 1.
        export: Writes a model to a path.
        load: Loads an artefact. Raises ``ArtefactError`` if it is missing or damaged,
            ``SettingError`` if the engine or device cannot run it, and ``MissingExtraError`` if the
            runtime is not installed.
        describe: Describes an artefact as JSON values, without a runtime: ``kind``, then other
            entries. Returns None if this exporter did not write the file.
        platform: Name of the platform in the Open Inference Protocol.
        stated_digest: Reads the digest that an artefact states of its own content, if it has one.
            Every runtime's ``load`` must compare the content with it. None means that artefacts
            have no such digest, so that all of an artefact is hashed before it is loaded.
        graph_digest: Digest of an artefact's nodes, shapes and constants, which the values of its
            weights do not change. Artefacts with the same digest compute the same operations at
            every batch size. None if the exporter has none.
        marker: File that identifies an artefact which is a folder; empty for single files.
        calibrated: Precisions that need ``ExportSpec.calibration``.
        opsets: Supported ONNX opsets, the default first.
        ranged: Whether artefacts are built for a range of batch sizes.
        fleet: Support for fleets; None if there is none.
        emulation: Precisions that are verified by emulation; None if there are none.
        float_layers: Set if layers that are not quantised can be computed below fp32; else None.
        device: The device that artefacts are built for; None means the CPU.
        gpu: Finds a GPU of this machine that can run artefacts which also run on the CPU, and
            returns its name, or None. Artefacts are verified on it too. None if there is no choice
            of devices.
        compiled_for: Kind of device that an artefact was compiled for, ``cpu`` or ``cuda``. Raises
            ``ArtefactError`` if it is missing or damaged. None means the CPU, or ``device``.
        updates: Set if artefacts hold only the updates; None if they hold a complete model.
        next_step: Command or Python expression that uses an artefact, from its path and manifest;
            None means aoft-predict and aoft-serve.
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
    stated_digest: Callable[[Path], str | None] | None = None
    graph_digest: Callable[[Path], str] | None = None
    marker: str = ""
    calibrated: tuple[str, ...] = ()
    opsets: tuple[int, ...] = ()
    ranged: bool = False
    fleet: FleetSupport | None = None
    emulation: Emulation | None = None
    float_layers: FloatLayers | None = None
    device: DeviceSupport | None = None
    gpu: Callable[[], str | None] | None = None
    compiled_for: Callable[[Path], str] | None = None
    updates: UpdateSupport | None = None
    next_step: Callable[[Path, Mapping[str, Any]], str] | None = None

    def owns(self, path: Path) -> bool:
        """Whether a path looks like an artefact of this exporter, by its suffix or marker."""
        return path.suffix == self.suffix or bool(self.marker and (path / self.marker).is_file())

    def emulates(self, precision: str) -> bool:
        """Whether artefacts of a precision are verified by emulation."""
        return self.emulation is not None and precision in self.emulation.precisions

    def usual_device(self, artefact: Path) -> str:
        """Kind of device that runs an artefact if none is chosen: ``cpu`` or ``cuda``.

        Raises:
            ArtefactError: The artefact tells it, and is missing or damaged.
        """
        if self.device is not None:
            return "cuda"
        return "cpu" if self.compiled_for is None else self.compiled_for(artefact)

    def device_name(self, artefact: Path, precision: str) -> str | None:
        """This machine's device that can run an artefact in its precision, or None."""
        if self.emulates(precision):
            return None
        if self.device is not None:
            return self.device.name(artefact)
        return "CPU" if self.usual_device(artefact) == "cpu" else gpu_name("cuda")
