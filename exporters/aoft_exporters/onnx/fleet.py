"""Run fleets whose tasks can change with ONNX Runtime.

On a CPU, ONNX Runtime reads the tables of the tasks from this process's memory. On a GPU they lie
in the GPU's memory: with a batch travel its images and the index of each image's task, and a task
that is added is copied to its own place, beside the tasks that requests use meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from aoft_deploy.artefacts.engine import EngineOptions, FleetTables
from aoft_deploy.artefacts.gpu_recording import RECORDING
from aoft_deploy.artefacts.onnx_metadata import checking
from aoft_deploy.artefacts.table_memory import HostMemory, TableMemory, physical_memory
from aoft_deploy.errors import AoftError, SettingError
from aoft_exporters.graph.fleet_tables import fleet_logits
from aoft_exporters.graph.tracing import OPSET
from aoft_exporters.onnx.cuda_driver import free_memory
from aoft_exporters.onnx.fleet_file import fleet_file
from aoft_exporters.onnx.gpu_block import GpuBlock, taken
from aoft_exporters.onnx.placement import placement_texts
from aoft_exporters.onnx.precisions import check_device
from aoft_exporters.onnx.sessions import device_index, library, reason, session

__all__ = ["DeviceMemory", "OnnxFleet"]

SPARE = 0.5
"""Memory of a device beyond the size, as a fraction of it, for gaps between classifiers."""

SHARE = 1 / 3
"""Fraction of a GPU's memory that a fleet takes if no budget is given.

The memory is what is free or held by fleets of this process. While a server replaces a fleet by its
next version, both are held, so the next version gets as much as this one.
"""


@dataclass(frozen=True)
class Place:
    """Where ONNX Runtime has memory.

    Attributes:
        kind: ``cpu`` or ``cuda``.
        index: Index of the GPU; 0 for the CPU.
    """

    kind: str
    index: int

    @classmethod
    def of(cls, device: str) -> Place:
        """The memory of a device such as ``cuda:1``."""
        return cls("cpu" if device == "cpu" else "cuda", device_index(device))

    def block(self, size: int) -> Any:
        """Memory of ``size`` bytes, whose address ``data_ptr`` gives; it is freed when dropped.

        Raises:
            Exception: There is less.
        """
        if self.kind == "cuda":
            return GpuBlock(size, self.index)
        return library().OrtValue.ortvalue_from_shape_and_type([size], np.uint8, self.kind)

    def using(self) -> AbstractContextManager[None]:
        """Context manager: use the memory while no CUDA graph is recorded."""
        return nullcontext() if self.kind == "cpu" else RECORDING.apart()


@dataclass(frozen=True, eq=False)
class DeviceTable:
    """A table in a device's memory.

    Attributes:
        memory: The memory, which lives as long as the table.
        place: Where it is.
        dtype: Type of the values.
        shape: The table's shape.
        address: Its first byte.
    """

    memory: Any
    place: Place
    dtype: DTypeLike
    shape: Sequence[int]
    address: int


class DeviceMemory:
    """Memory of a device, taken at once.

    Attributes:
        size: See ``TableMemory``.

    Args:
        size: Bytes that are needed.
        device: ``cuda:0`` …, or ``cpu``.

    Raises:
        SettingError: The device has less free memory.
    """

    def __init__(self, size: int, device: str) -> None:
        self.size = size + int(SPARE * size)
        self._place = Place.of(device)
        self._copy = session(_copying(), 1, device, Path("copy.onnx"))
        try:
            with self._place.using():
                self._memory = self._place.block(self.size)
        except Exception as error:  # ONNX Runtime raises its own classes, all Exception
            raise SettingError(
                f"{device} has no room for {self.size} bytes of tasks ({reason(error)}): give a "
                "smaller `budget`."
            ) from error

    def table(self, offset: int, shape: Sequence[int], dtype: DTypeLike) -> DeviceTable:
        """A table in this memory; see ``TableMemory``."""
        address = self._memory.data_ptr() + offset
        return DeviceTable(self._memory, self._place, dtype, shape, address)

    def write(self, offset: int, values: NDArray[Any]) -> None:
        """Copy values to a place; see ``TableMemory``."""
        content = values.reshape(-1).view(np.uint8)
        if not content.size:
            return
        place = self.table(offset, content.shape, content.dtype)
        with self._place.using():
            binding = self._copy.io_binding()
            binding.bind_cpu_input("values", content)
            binding.bind_output("place", *_location(place))
            self._copy.run_with_iobinding(binding)  # ends when the device has copied them

    def release(self, start: int, end: int) -> None:
        """The device's memory stays taken."""


class OnnxFleet:
    """A fleet in an ONNX Runtime session that reads the tasks' tables in place.

    Many threads may call ``run`` at once; a GPU computes one batch for each lane at a time.

    Attributes:
        info: Metadata of the file; on a GPU also its placement, as for ``OnnxGpuEngine``.
        tables: Tables of the tasks that the file holds.

    Args:
        path: A file of ``export_fleet``.
        options: Threads, device and lanes.

    Raises:
        ArtefactError: The file is missing, damaged or no fleet, or refers to other files.
        SettingError: The device does not exist, does not start, or does not compute the file's
            precision.
        MissingExtraError: ONNX Runtime, or the one for GPUs, is not installed.
    """

    def __init__(self, path: Path, options: EngineOptions = EngineOptions()) -> None:
        self._device = options.device or "cpu"
        with checking(path) as info, fleet_file(path) as (graph, tables):
            check_device(info, self._device, path)
            tf32 = info.get("precision") == "tf32"
            self._session = session(graph, options.cpu_threads(), self._device, path, tf32=tf32)
        self.info: Mapping[str, str] = info
        self.tables: FleetTables | None = tables
        self._path, self._place = path, Place.of(self._device)
        lanes = threading.BoundedSemaphore(options.lanes)
        on_cpu = self._place.kind == "cpu"
        if not on_cpu:
            self.info = {**self.info, **placement_texts(self._session)}
        self._lane: AbstractContextManager[Any] = nullcontext() if on_cpu else lanes

    def capacity(self) -> int:
        """The machine's memory, or a budget with which the fleet takes ``SHARE`` of the GPU's.

        The fleet takes at most half of what is free, so that several fleets have room.
        """
        if self._place.kind == "cpu":
            return physical_memory()
        free, held = free_memory(self._place.index), taken(self._place.index)
        return int(min(SHARE * (free + held), free / 2) / (1 + SPARE))

    def reserve(self, size: int) -> TableMemory:
        """Memory for tables of ``size`` bytes, of this process or of the GPU.

        Raises:
            SettingError: The system or the GPU has less.
        """
        on_cpu = self._place.kind == "cpu"
        return HostMemory(size) if on_cpu else DeviceMemory(size, self._device)

    def run(
        self,
        images: NDArray[np.float32],
        task: NDArray[np.int64],
        tables: FleetTables,
    ) -> NDArray[np.float32]:
        """Logits, (batch, columns), −inf beyond each task's own classes; see ``FleetEngine``.

        Raises:
            AoftError: The device failed.
        """

        def run(images: NDArray[Any], task: NDArray[np.int64]) -> NDArray[np.float32]:
            return self._run({"pixel_values": images, "task": task, **tables.by_name()})

        try:
            return fleet_logits(run, images, np.asarray(task, np.int64), self.info)
        except Exception as error:  # ONNX Runtime raises its own classes, all Exception
            raise AoftError(
                f"{self._path} could not be computed on {self._device} ({reason(error)})."
            ) from error

    def _run(self, feed: Mapping[str, Any]) -> NDArray[np.float32]:
        """Logits of a batch, whose tables stay where they are."""
        with self._lane, self._place.using():
            binding = self._session.io_binding()
            for name, value in feed.items():
                if isinstance(value, DeviceTable):
                    binding.bind_input(name, *_location(value))
                else:
                    binding.bind_cpu_input(name, np.ascontiguousarray(value))
            binding.bind_output("logits", "cpu")
            self._session.run_with_iobinding(binding)
            return np.asarray(binding.copy_outputs_to_cpu()[0], np.float32)


def _location(table: DeviceTable) -> tuple[Any, ...]:
    """A table as ``IOBinding`` takes it."""
    place = table.place
    return place.kind, place.index, table.dtype, table.shape, table.address


def _copying() -> bytes:
    """An ONNX model that copies the bytes ``values`` to ``place``."""
    import onnx

    source, target = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, ["bytes"])
        for name in ("values", "place")
    )
    node = onnx.helper.make_node("Identity", ["values"], ["place"])
    graph = onnx.helper.make_graph([node], "copy", [source], [target])
    opset = onnx.helper.make_opsetid("", OPSET)
    model = onnx.helper.make_model_gen_version(graph, opset_imports=[opset])
    return bytes(model.SerializeToString())
