"""Run fleets whose tasks can change with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.engine import EngineOptions, FleetTables
from aoft_deploy.artefacts.onnx_metadata import checked_metadata
from aoft_deploy.errors import ArtefactError
from aoft_exporters.graph.fleet_tables import FLEET_TABLES, fleet_logits
from aoft_exporters.onnx.engine import session

__all__ = ["OnnxFleet"]


class OnnxFleet:
    """A fleet in an ONNX Runtime session that reads the tasks' tables from the caller's memory.

    Attributes:
        info: Metadata of the file.
        tables: Tables of the tasks that the file holds.

    Args:
        path: A file of ``export_fleet``.
        options: Threads and device.

    Raises:
        ArtefactError: The file is missing, damaged or no fleet, or refers to other files.
        SettingError: The device does not exist or does not start.
        MissingExtraError: ONNX Runtime, or the one for GPUs, is not installed.
    """

    def __init__(self, path: Path, options: EngineOptions = EngineOptions()) -> None:
        import onnx

        self.info: Mapping[str, str] = checked_metadata(path)
        try:
            proto = onnx.load(path, load_external_data=False)
        except Exception as error:  # protobuf raises its own classes
            raise ArtefactError(f"{path} is no ONNX model ({error}).") from error
        stored = {i.name: i for i in proto.graph.initializer if i.name in FLEET_TABLES}
        if set(stored) != set(FLEET_TABLES):
            raise ArtefactError(f"{path} is no fleet: export the checkpoints as a fleet first.")
        self.tables: FleetTables | None = FleetTables(
            **{name: onnx.numpy_helper.to_array(tensor) for name, tensor in stored.items()}
        )
        for name, axis in FLEET_TABLES.items():
            proto.graph.initializer.remove(stored[name])
            shape = [axis, *stored[name].dims[1:]]
            kind = stored[name].data_type
            proto.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, shape))
        device = options.device or "cpu"
        self._session = session(proto.SerializeToString(), options.threads, device, path)

    def run(
        self,
        images: NDArray[np.float32],
        task: NDArray[np.int64],
        tables: FleetTables,
    ) -> NDArray[np.float32]:
        """Logits, (batch, columns), −inf beyond each task's own classes; see ``FleetEngine``."""

        def run(images: NDArray[Any], task: NDArray[np.int64]) -> NDArray[np.float32]:
            feed = {"pixel_values": images, "task": task, **tables.by_name()}
            logits: Any = self._session.run(["logits"], feed)[0]
            return np.asarray(logits, np.float32)

        return fleet_logits(run, images, np.asarray(task, np.int64), self.info)
