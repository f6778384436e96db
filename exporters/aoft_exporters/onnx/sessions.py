"""Open ONNX Runtime sessions on a CPU or a GPU, without fallback from one to the other."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from typing import Any

from aoft_deploy.artefacts.gpu_recording import RECORDING
from aoft_deploy.errors import (
    AoftError,
    ArtefactError,
    MissingExtraError,
    SettingError,
    optional_imports,
)
from aoft_deploy.processors import limited
from aoft_exporters.onnx.cuda_driver import gpu_name
from aoft_exporters.onnx.cuda_libraries import (
    driver_failure,
    load_cuda_libraries,
    provider_failure,
)
from aoft_exporters.onnx.placement import (
    CPU_PROVIDER,
    RECORD_PLACEMENT,
    check_placement,
    placement_of,
)

__all__ = ["device_index", "library", "reason", "refusal", "session", "usable_gpu"]

CUDA_PROVIDER = "CUDAExecutionProvider"
LEAST_CUDA_VERSION = (1, 25)
"""ONNX Runtime from which the CUDA provider computes the operator Attention of opset 23."""

_SILENT = 4
"""Log level of ONNX Runtime: exceptions tell what it would write to standard error."""

_DEVICE_FAILURE = re.compile(
    r"(?:CUDA|CUDNN|CUBLAS) failure \d+: [^;\n]*|Invalid device ID: [^;\n]*\)"
    r"|Failed to allocate memory for requested buffer of size \d+"
)


def library() -> Any:
    """Import ONNX Runtime with telemetry disabled.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    with optional_imports():
        return importlib.import_module("onnxruntime")


def usable_gpu() -> str | None:
    """Name of the first GPU if this ONNX Runtime is the one for GPUs; None if there is no GPU.

    No CUDA library but the driver is loaded, and the driver only by the ONNX Runtime for GPUs.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
    """
    is_for_gpus = CUDA_PROVIDER in library().get_available_providers()
    return gpu_name(0) if is_for_gpus else None


def session(
    model: Path | bytes,
    threads: int | None,
    device: str,
    path: Path,
    *,
    tf32: bool = False,
    recorded: bool = False,
) -> Any:
    """Open an ONNX Runtime session on the given device, without fallback to another.

    Args:
        model: The file, or its content.
        threads: Threads within an operator; None lets ONNX Runtime choose.
        device: ``cpu``, ``cuda``, or ``cuda:1`` for the second GPU.
        path: The file that error messages name.
        tf32: Whether a GPU may round the factors of float32 products to TF32.
        recorded: Whether a GPU records its runs as CUDA graphs; see ``GpuLane``.

    Raises:
        ArtefactError: ONNX Runtime cannot read the model.
        SettingError: The device does not exist or does not start, or the CPU would compute some of
            the model's layers.
        MissingExtraError: ONNX Runtime, or the one for GPUs, is not installed.
    """
    ort = library()
    providers = _providers(ort, device, tf32=tf32, recorded=recorded)
    options = ort.SessionOptions()
    options.log_severity_level = _SILENT
    threads = threads or limited()
    if threads is not None:
        options.intra_op_num_threads = threads
    options.add_session_config_entry(RECORD_PLACEMENT, "1")
    # A pattern is a second block of memory for each batch size, beside that of its first run.
    options.enable_mem_pattern = not recorded
    if device != "cpu":
        _prepare_gpu(ort, device)
    try:
        with RECORDING.apart():
            opened = ort.InferenceSession(model, options, providers, enable_fallback=0)
        opened.get_inputs()[0]
        opened._model_bytes = None  # it would keep the content that it was opened from
    except Exception as error:  # ONNX Runtime raises its own classes, all Exception
        if recorded and "graph capture" in str(error):  # the CPU would compute layers: name them
            session(model, threads, device, path, tf32=tf32)
        raise refusal(error, device, path) from error
    if opened.get_providers()[0] != providers[0][0]:
        raise _not_started(device, provider_failure(Path(ort.__file__).parent))
    if device != "cpu":
        check_placement(placement_of(opened), path, device, ort.__version__)
    return opened


def device_index(device: str) -> int:
    """Number of a GPU: 1 for ``cuda:1``, 0 for ``cuda``."""
    return int(device.partition(":")[2] or 0)


def reason(error: Exception) -> str:
    """ONNX Runtime's message in one line, without prefix, source location and path of the model."""
    if failure := _DEVICE_FAILURE.search(str(error)):
        return failure[0].strip()
    text = " ".join(str(error).split())
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from .*? failed:)?", "", text)
    return re.sub(r"/\S+:\d+ .*?\) ", "", text)[:160].rstrip(".")


def refusal(error: Exception, device: str, path: Path) -> AoftError:
    """The error for a model that cannot be opened or run: the device's fault, or the model's."""
    if _DEVICE_FAILURE.search(str(error)):
        return _not_started(device, reason(error))
    return ArtefactError(f"{path} is no ONNX model that can be run ({reason(error)}).")


def _not_started(device: str, why: str) -> SettingError:
    return SettingError(
        f"ONNX Runtime could not start on {device} ({why or 'it gives no reason'}): check the "
        "number of the GPU, its driver and, with pip check, the CUDA libraries, or choose "
        '`device="cpu"`.'
    )


def _prepare_gpu(ort: Any, device: str) -> None:
    """Load the libraries of the CUDA provider, and silence the log that it writes by itself.

    Raises:
        SettingError: ONNX Runtime is too old, or there is no driver.
    """
    version = tuple(int(part) for part in ort.__version__.split(".")[:2])
    if version < LEAST_CUDA_VERSION:
        least = ".".join(map(str, LEAST_CUDA_VERSION))
        raise SettingError(
            f"Device {device!r} needs onnxruntime-gpu {least} or newer, but {ort.__version__} is "
            "installed: run pip install --upgrade 'aoft-deploy[gpu]'."
        )
    if failure := driver_failure():
        raise SettingError(
            f"Device {device!r} needs NVIDIA's driver, which cannot be loaded ({failure}): install "
            'it, or choose `device="cpu"`.'
        )
    ort.set_default_logger_severity(_SILENT)
    load_cuda_libraries(ort.cuda_version)


def _providers(
    ort: Any, device: str, *, tf32: bool, recorded: bool
) -> list[tuple[str, dict[str, str]]]:
    """Execution providers of a device with their options, in order of preference.

    CUDA computes float32 products in TF32 unless that is turned off. The convolution's algorithm is
    chosen by cuDNN's heuristics, since measuring all of them would take seconds for each size.

    Raises:
        SettingError: The device is unknown.
        MissingExtraError: The installed package supports the CPU only.
    """
    if device == "cpu":
        return [(CPU_PROVIDER, {})]
    if not re.fullmatch(r"cuda(:\d+)?", device):
        hint = '; export with `to="tensorrt"` to run in TensorRT' if "tensorrt" in device else ""
        raise SettingError(
            f"Unknown device of ONNX Runtime {device!r}: give cpu, cuda, or cuda:1 for the second "
            f"of several GPUs{hint}."
        )
    if CUDA_PROVIDER not in ort.get_available_providers():
        raise MissingExtraError("onnxruntime-gpu", "gpu", replaces="onnxruntime")
    cuda = {
        "device_id": str(device_index(device)),
        "use_tf32": str(int(tf32)),
        "enable_cuda_graph": str(int(recorded)),
        "cudnn_conv_algo_search": "HEURISTIC",
    }
    return [(CUDA_PROVIDER, cuda), (CPU_PROVIDER, {})]
