"""Run OpenVINO folders, fleets and float32 ONNX files with OpenVINO's CPU plugin."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.engine import EngineOptions, FleetTables
from aoft_deploy.artefacts.inputs import check_batch
from aoft_deploy.artefacts.onnx_metadata import checked_metadata
from aoft_deploy.artefacts.table_memory import HostMemory, TableMemory, physical_memory
from aoft_deploy.errors import ArtefactError, SettingError
from aoft_exporters.graph.fleet_tables import FLEET_TABLES, fleet_logits
from aoft_exporters.openvino.digest import check_digest
from aoft_exporters.openvino.files import MARKER, SECTION, TASKS
from aoft_exporters.openvino.library import (
    ARITHMETIC,
    check_arithmetic,
    inference_precision,
    openvino_library,
)

__all__ = ["OpenvinoEngine", "OpenvinoFleet", "load"]


class OpenvinoEngine:
    """A folder, or a float32 ONNX file, compiled for the CPU in the artefact's precision.

    Many threads may call ``run`` at once; OpenVINO computes one batch at a time in each lane.

    Attributes:
        info: Metadata stored in the graph.
        takes_pixels: Whether the input is uint8 [batch, H, W, 3].
        takes_tasks: Whether the artefact is a fleet.
        device: ``cpu``.

    Args:
        path: The folder or file.
        options: Threads and lanes.

    Raises:
        ArtefactError: The artefact is missing or damaged, or was not written by ``export``.
        SettingError: The processor or OpenVINO does not support the artefact's precision.
        MissingExtraError: OpenVINO is not installed.
    """

    device = "cpu"

    def __init__(self, path: Path, options: EngineOptions = EngineOptions()) -> None:
        file = path if path.suffix == ".onnx" else path / MARKER
        if not file.is_file():
            if file == path:
                raise ArtefactError(f"There is no file {path}.")
            raise ArtefactError(f"There is no folder {path} with an {MARKER}.")
        self._compiled = _Compiled(path, file, options)
        self.info: Mapping[str, str] = self._compiled.info
        self.takes_tasks = "task" in self._compiled.inputs
        self.takes_pixels = "image" in self._compiled.inputs
        name = "image" if self.takes_pixels else "pixel_values"
        self._expects = np.uint8 if self.takes_pixels else np.float32, self._compiled.inputs[name]
        self._name = name
        self._tasks = len(json.loads(self.info["tasks"])) if self.takes_tasks else None
        self._tables = _tables(path) if "bank" in self._compiled.inputs else None
        if file != path:
            check_digest(path)

    @property
    def arithmetic(self) -> str:
        """Inference precision that OpenVINO reports: ``f32`` or ``bf16``."""
        return str(self._compiled.property("INFERENCE_PRECISION_HINT").to_string())

    @property
    def threads(self) -> int:
        """Threads of all lanes."""
        return int(self._compiled.property("INFERENCE_NUM_THREADS"))

    def run(
        self, images: NDArray[Any], task: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Logits of a batch in the artefact's input form; see ``Engine``."""
        check_batch(images, task, takes=self._expects, tasks=self._tasks)
        if task is None:
            return self._compiled.run({self._name: images})
        return self._compiled.run_fleet(images, task, self._tables)


class OpenvinoFleet:
    """A fleet's folder that reads the tasks' tables from the caller's memory.

    Attributes:
        info: Metadata stored in the graph.
        tables: Tables of the tasks that the folder holds.

    Args:
        path: A folder of ``export_fleet``.
        options: Threads and lanes.

    Raises:
        ArtefactError: The folder is missing, damaged, or no fleet.
        SettingError: The device is not the CPU.
        MissingExtraError: OpenVINO is not installed.
    """

    def __init__(self, path: Path, options: EngineOptions = EngineOptions()) -> None:
        _check_device(options)
        if not (path / MARKER).is_file():
            raise ArtefactError(f"There is no folder {path} with an {MARKER}.")
        if not (path / TASKS).is_file():
            raise ArtefactError(f"{path} is no fleet: export the checkpoints as a fleet first.")
        self._compiled = _Compiled(path, path / MARKER, options)
        self.info: Mapping[str, str] = self._compiled.info
        self.tables: FleetTables | None = _tables(path)
        check_digest(path)

    def capacity(self) -> int:
        """The machine's memory, in bytes."""
        return physical_memory()

    def reserve(self, size: int) -> TableMemory:
        """Memory of this process for tables of ``size`` bytes."""
        return HostMemory(size)

    def run(
        self,
        images: NDArray[np.float32],
        task: NDArray[np.int64],
        tables: FleetTables,
    ) -> NDArray[np.float32]:
        """Logits, (batch, columns), −inf beyond each task's own classes; see ``FleetEngine``."""
        return self._compiled.run_fleet(images, np.asarray(task, np.int64), tables)


class _Compiled:
    """A graph compiled for the CPU, with a pool of inference requests."""

    def __init__(self, path: Path, file: Path, options: EngineOptions) -> None:
        core = openvino_library().Core()
        # a model in use must not change when its file is rewritten
        core.set_property({"ENABLE_MMAP": False})
        # an ONNX file is checked first: OpenVINO would open the files that it refers to
        onnx_metadata = _onnx_metadata(file) if file == path else None
        graph = _read(core, file, path)
        self.info: Mapping[str, str] = onnx_metadata or _metadata(graph, path)
        precision = self.info["precision"]
        check_arithmetic(core, precision)
        properties: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": inference_precision(core, self.info),
            "NUM_STREAMS": options.lanes,
        }
        threads = options.cpu_threads()
        if threads is not None:
            properties["INFERENCE_NUM_THREADS"] = threads * options.lanes
        try:
            self._model = core.compile_model(graph, "CPU", properties)
        except RuntimeError as error:
            raise ArtefactError(f"{path} cannot be compiled ({_reason(error)}).") from error
        self.inputs: dict[str, tuple[int | None, ...]] = {
            port.get_any_name(): tuple(
                None if axis.is_dynamic else axis.get_length()
                for axis in list(port.partial_shape)[1:]
            )
            for port in self._model.inputs
        }
        self._idle: deque[Any] = deque()

    def property(self, name: str) -> Any:
        """A property of the compiled model."""
        return self._model.get_property(name)

    def run(self, feed: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Logits of a batch. Contiguous inputs are read in place."""
        try:
            request = self._idle.pop()  # deque.pop is atomic
        except IndexError:
            request = self._model.create_infer_request()
        try:
            inputs = {name: np.ascontiguousarray(value) for name, value in feed.items()}
            (logits,) = request.infer(inputs, share_inputs=True).values()
            return np.array(logits, np.float32)
        finally:
            self._idle.append(request)

    def run_fleet(
        self, images: NDArray[Any], task: NDArray[np.int64], tables: FleetTables | None
    ) -> NDArray[np.float32]:
        """Logits of a fleet. Without ``tables``, the graph holds them as constants."""
        task, inputs = (task, {}) if tables is None else _batch_tables(task, tables)

        def run(images: NDArray[Any], task: NDArray[np.int64]) -> NDArray[np.float32]:
            return self.run({"pixel_values": images, "task": task, **inputs})

        return fleet_logits(run, images, task, self.info)


def _batch_tables(
    task: NDArray[np.int64], tables: FleetTables
) -> tuple[NDArray[np.int64], dict[str, NDArray[Any]]]:
    """Each image's row in the tables of the batch's tasks, and these tables.

    OpenVINO returns no logits for tables of more than 2³¹ elements, which a live fleet may have.
    """
    unique, index = np.unique(task, return_inverse=True)
    first, count = tables.first[unique], tables.count[unique]
    heads = np.concatenate(
        [tables.heads[start : start + height] for start, height in zip(first, count, strict=True)]
    )
    inputs = {
        "bank": tables.bank[unique],
        "heads": heads,
        "first": np.cumsum(count) - count,
        "count": count,
        "columns": tables.columns,
    }
    return index.astype(np.int64), inputs


def _tables(path: Path) -> FleetTables:
    """Tables of the tasks in a fleet's folder.

    Raises:
        ArtefactError: Their file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tables = load_file(path / TASKS)
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{path / TASKS} cannot be read ({error}).") from error
    if set(tables) != set(FLEET_TABLES):
        raise ArtefactError(f"{path / TASKS} does not hold a fleet's tables.")
    return FleetTables(**tables)


def _read(core: Any, file: Path, path: Path) -> Any:
    try:
        return core.read_model(file)
    except RuntimeError as error:
        raise ArtefactError(f"{path} is no OpenVINO model ({_reason(error)}).") from error


def _metadata(graph: Any, path: Path) -> dict[str, str]:
    """Metadata of a folder's graph.

    Raises:
        ArtefactError: There are none, or they name no precision.
    """
    found = graph.get_rt_info([SECTION]).value if graph.has_rt_info([SECTION]) else None
    if not isinstance(found, dict) or found.get("precision") not in ARITHMETIC:
        raise ArtefactError(
            f"{path} does not name its precision: it was not written by aoft-export."
        )
    return {str(name): str(text) for name, text in found.items()}


def _onnx_metadata(path: Path) -> dict[str, str]:
    """Metadata of an ONNX file, with its precision.

    Raises:
        ArtefactError: The file is damaged, or refers to other files.
        SettingError: The file is not in float32.
    """
    metadata = checked_metadata(path)
    if metadata.setdefault("precision", "fp32") != "fp32":
        raise SettingError(
            f"{path} is in {metadata['precision']}, which OpenVINO computes differently from the "
            'verified engine: choose `engine="onnxruntime"`, or export to openvino with `to`.'
        )
    return metadata


def _reason(error: RuntimeError) -> str:
    """Last line of OpenVINO's message, after its source locations."""
    return " ".join(str(error).strip().rpartition("\n")[2].split())[:160]


def load(path: Path, options: EngineOptions = EngineOptions()) -> OpenvinoEngine:
    """Open an artefact for inference; see ``OpenvinoEngine``.

    Raises:
        SettingError: The device is not the CPU.
    """
    _check_device(options)
    return OpenvinoEngine(path, options)


def _check_device(options: EngineOptions) -> None:
    """Raise SettingError unless the device is the CPU."""
    if options.device not in (None, "cpu"):
        raise SettingError(
            f"OpenVINO runs artefacts on the CPU, not on {options.device!r}: leave `device` out."
        )
