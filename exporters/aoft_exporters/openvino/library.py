"""The openvino package: imported without telemetry, and which arithmetic it can do here."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from aoft_deploy.errors import MissingExtraError, SettingError

if TYPE_CHECKING:
    pass

__all__ = ["check_arithmetic", "openvino_library", "without_telemetry"]


def openvino_library() -> Any:
    """The library."""
    try:
        with without_telemetry():
            import openvino
    except ImportError as error:
        raise MissingExtraError("openvino", "openvino") from error
    return openvino


@contextlib.contextmanager
def without_telemetry() -> Iterator[None]:
    """Let what is imported meanwhile find no package that reports its use over the network."""
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
    """OpenVINO would emulate bf16 in float32, which is slower than float32 itself."""
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        name = " ".join(core.get_property("CPU", "FULL_DEVICE_NAME").split())
        raise SettingError(
            f"The processor ({name}) does not compute in bf16: use one with AVX512-BF16 or AMX, or "
            "export with --precision fp32 or int8."
        )
