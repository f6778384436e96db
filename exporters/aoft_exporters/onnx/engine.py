"""Run ONNX files with ONNX Runtime."""

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

from aoft_deploy.artefacts.inputs import check_batch
from aoft_deploy.artefacts.onnx_metadata import checked_metadata
from aoft_deploy.errors import ArtefactError, MissingExtraError, SettingError, optional_imports
from aoft_deploy.processors import limited
from aoft_exporters.graph.fleet_tables import fleet_logits

__all__ = ["OnnxEngine", "library", "session"]

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
            return fleet_logits(self._run, images, task, self.info)
        return self._run(images)

    def _run(
        self, images: NDArray[Any], task: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        feed = {self.input_name: images} | ({} if task is None else {"task": task})
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
