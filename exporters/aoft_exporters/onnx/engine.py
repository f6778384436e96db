"""Run ONNX files and fleets with ONNX Runtime."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.engine import EngineOptions, FleetTables
from aoft_deploy.artefacts.inputs import check_batch
from aoft_deploy.artefacts.onnx_metadata import checked_metadata
from aoft_deploy.errors import ArtefactError, MissingExtraError, SettingError, optional_imports
from aoft_deploy.processors import limited
from aoft_exporters.graph.fleet_tables import FLEET_TABLES, folded_logits
from aoft_exporters.onnx.precisions import check_device

__all__ = ["OnnxEngine", "OnnxFleet", "library", "session"]

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
"""ONNX Runtime's execution provider for each kind of device."""


def library() -> Any:
    """Import ONNX Runtime with telemetry disabled.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    with optional_imports():
        return importlib.import_module("onnxruntime")


def session(model: Path | bytes, threads: int | None, device: str, path: Path) -> Any:
    """Open an ONNX Runtime session on the given device, without fallback to another.

    Args:
        model: The file, or its content.
        threads: Threads within an operator; None lets ONNX Runtime choose.
        device: As for ``OnnxEngine``.
        path: The file that error messages name.

    Raises:
        ArtefactError: ONNX Runtime cannot read the model.
        SettingError: The device does not exist or does not start.
        MissingExtraError: ONNX Runtime, or the one for GPUs, is not installed.
    """
    ort = library()
    options = ort.SessionOptions()
    options.log_severity_level = 4  # exceptions report errors
    threads = threads or limited()
    if threads is not None:
        options.intra_op_num_threads = threads
    providers = _providers(ort, device)
    if device != "cpu":
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()  # finds the CUDA libraries that pip installed
    try:
        opened = ort.InferenceSession(model, options, providers)
        opened.get_inputs()[0]
    except Exception as error:  # ONNX Runtime raises its own classes, all Exception
        raise ArtefactError(
            f"{path} is no ONNX model that can be run ({_reason(error)})."
        ) from error
    if opened.get_providers()[0] != providers[0][0]:  # it falls back to the CPU by itself
        raise SettingError(
            f"ONNX Runtime could not start on {device}: check that the driver and the CUDA "
            'libraries match those that onnxruntime-gpu requires, or choose `device="cpu"`.'
        )
    return opened


def _reason(error: Exception) -> str:
    """ONNX Runtime's message without prefix, source location and path of the model."""
    text = " ".join(str(error).split())
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from .*? failed:)?", "", text)
    return re.sub(r"/\S+:\d+ .*?\) ", "", text)[:160].rstrip(".")


def _providers(ort: Any, device: str) -> list[tuple[str, dict[str, str]]]:
    """Execution providers of a device with their options, in order of preference.

    CUDA computes float32 products in TF32 by default. TF32 is turned off, since artefacts are
    verified in float32.

    Raises:
        SettingError: The device is unknown.
        MissingExtraError: The installed package supports the CPU only.
    """
    kind, _, index = device.partition(":")
    if kind not in PROVIDERS or not (index or "0").isdecimal() or (kind == "cpu" and index):
        raise SettingError(
            f"Unknown device of ONNX Runtime {device!r}: give cpu, cuda or tensorrt, with a number "
            "for one of several GPUs, such as cuda:1."
        )
    if PROVIDERS[kind] not in ort.get_available_providers():
        raise MissingExtraError("onnxruntime-gpu", "gpu", replaces="onnxruntime")
    gpu = {"device_id": index or "0"}
    chosen = [(PROVIDERS["tensorrt"], gpu)] if kind == "tensorrt" else []
    if kind != "cpu":
        chosen.append((PROVIDERS["cuda"], {**gpu, "use_tf32": "0"}))
    return [*chosen, (PROVIDERS["cpu"], {})]


class OnnxEngine:
    """An ONNX file in an ONNX Runtime session.

    Attributes:
        device: ``cpu``, ``cuda:0`` or ``tensorrt:0`` …

    Args:
        path: The file.
        threads: Threads within an operator; None lets ONNX Runtime choose.
        device: ``cpu``, ``cuda`` or ``tensorrt``, with a number for one of several GPUs, such as
            ``cuda:1``.

    Raises:
        ArtefactError: The file is missing, refers to other files, or cannot be read.
        SettingError: The device does not exist or does not start.
        MissingExtraError: ONNX Runtime, or the one for GPUs, is not installed.
    """

    def __init__(self, path: Path, threads: int | None = None, device: str = "cpu") -> None:
        self.info: Mapping[str, str] = checked_metadata(path)
        check_device(self.info, device, path)
        self._session = session(path, threads, device, path)
        self._run_options = self._new_run_options()
        self.device = device if device == "cpu" or ":" in device else f"{device}:0"
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._input = self._session.get_inputs()[0]
        dtype = np.uint8 if self.takes_pixels else np.float32
        shape = tuple(side if isinstance(side, int) else None for side in self._input.shape[1:])
        self._expects = dtype, shape
        self._tasks = _task_count(self.info, path) if self.takes_tasks else None

    @property
    def takes_pixels(self) -> bool:
        """Whether the input is uint8 [batch, H, W, 3]."""
        return str(self._input.type) == "tensor(uint8)"

    @property
    def input_name(self) -> str:
        """``pixel_values`` or ``image``."""
        return str(self._input.name)

    @property
    def takes_tasks(self) -> bool:
        """Whether the file is a fleet, which needs a task for each image."""
        return "task" in self._inputs

    def run(
        self, images: NDArray[Any], task: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Logits of a batch in the file's input form; see ``Engine``."""
        check_batch(images, task, takes=self._expects, tasks=self._tasks)
        if task is not None:
            return _fleet_logits(self._session, images, task, {}, self.info)
        feed = {self.input_name: images}
        logits: Any = self._session.run(["logits"], feed, self._run_options)[0]
        return np.asarray(logits, np.float32)

    def stop(self) -> None:
        """Abort the current runs between two operators; later runs are not affected."""
        options, self._run_options = self._run_options, self._new_run_options()
        options.terminate = True

    @staticmethod
    def _new_run_options() -> Any:
        return library().RunOptions()


def _task_count(info: Mapping[str, str], path: Path) -> int:
    try:
        return len(json.loads(info.get("tasks", "[]")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ArtefactError(f"{path} does not name its tasks ({error}).") from error


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
        check_device(self.info, device, path)
        self._session = session(proto.SerializeToString(), options.threads, device, path)

    def run(
        self,
        images: NDArray[np.float32],
        task: NDArray[np.int64],
        tables: FleetTables,
    ) -> NDArray[np.float32]:
        """Logits, (batch, columns), −inf beyond each task's own classes; see ``FleetEngine``."""
        return _fleet_logits(self._session, images, task, tables.by_name(), self.info)


def _fleet_logits(
    session: Any,
    images: NDArray[Any],
    task: NDArray[np.int64],
    tables: Mapping[str, NDArray[Any]],
    info: Mapping[str, str],
) -> NDArray[np.float32]:
    """Logits of a fleet; the folded form options one task at a time."""

    def run(images: NDArray[Any], task: NDArray[np.int64]) -> NDArray[np.float32]:
        logits: Any = session.run(["logits"], {"pixel_values": images, "task": task, **tables})[0]
        return np.asarray(logits, np.float32)

    task = np.asarray(task, np.int64)
    if info.get("form") == "folded":
        return folded_logits(run, images, task)
    return run(images, task)
