"""Import OpenVINO without telemetry and check what the processor supports."""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from aoft_deploy.errors import SettingError, optional_imports
from aoft_exporters.openvino.files import FLOAT_LAYERS

__all__ = [
    "ARITHMETIC",
    "check_arithmetic",
    "computes_bf16",
    "inference_precision",
    "openvino_library",
    "without_telemetry",
]

ARITHMETIC = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
"""OpenVINO's inference precision for each artefact precision; quantised parts stay in int8.

See ``inference_precision`` for the layers that int8 leaves in float."""

_FIRST_USE = threading.Lock()


def openvino_library() -> Any:
    """Import OpenVINO with telemetry disabled, ready for several threads.

    OpenVINO 2026.4 fills its table of NumPy types at the first use, and two threads that do so at
    once block each other for ever. So this function fills it, in one thread.

    Raises:
        MissingExtraError: OpenVINO is not installed.
    """
    with optional_imports(), without_telemetry():
        openvino: Any = importlib.import_module("openvino")
    with _FIRST_USE:
        openvino.Type.f32.to_dtype()
    return openvino


@contextlib.contextmanager
def without_telemetry() -> Iterator[None]:
    """Context manager: hide the telemetry package from imports."""
    name = "openvino_telemetry"
    hidden = name not in sys.modules
    modules: dict[str, Any] = sys.modules
    if hidden:
        modules[name] = None
    try:
        yield
    finally:
        if hidden:
            del modules[name]


def computes_bf16(core: Any) -> bool:
    """Whether the processor has instructions for bf16."""
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def inference_precision(core: Any, info: Mapping[str, str]) -> str:
    """OpenVINO's inference precision for an artefact on this machine: ``f32`` or ``bf16``.

    The layers that int8 leaves in float are computed in float32 if the artefact does not state
    bf16, or if the processor has no instructions for it.

    Args:
        core: OpenVINO's core.
        info: The artefact's metadata.
    """
    if info.get(FLOAT_LAYERS) == "bf16" and computes_bf16(core):
        return "bf16"
    return ARITHMETIC[info["precision"]]


def check_arithmetic(core: Any, precision: str) -> None:
    """Refuse bf16 on a processor without it: OpenVINO's emulation is slower than float32.

    Raises:
        SettingError: The processor does not compute in bf16.
    """
    if precision == "bf16" and not computes_bf16(core):
        name = " ".join(core.get_property("CPU", "FULL_DEVICE_NAME").split())
        raise SettingError(
            f"The processor ({name}) does not compute in bf16: use one with AVX512-BF16 or AMX, or "
            "export in fp32 or int8."
        )
