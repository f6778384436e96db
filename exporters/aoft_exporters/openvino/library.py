"""Import OpenVINO without telemetry and check what the processor supports."""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

from aoft_deploy.errors import SettingError, optional_imports

__all__ = ["check_arithmetic", "openvino_library", "without_telemetry"]

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


def check_arithmetic(core: Any, precision: str) -> None:
    """Refuse bf16 on a processor without it: OpenVINO's emulation is slower than float32.

    Raises:
        SettingError: The processor does not compute in bf16.
    """
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        name = " ".join(core.get_property("CPU", "FULL_DEVICE_NAME").split())
        raise SettingError(
            f"The processor ({name}) does not compute in bf16: use one with AVX512-BF16 or AMX, or "
            "export in fp32 or int8."
        )
