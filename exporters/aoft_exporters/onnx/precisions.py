"""Precisions that ONNX Runtime computes on a GPU only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from aoft_deploy.errors import SettingError

__all__ = ["GPU_ONLY", "check_device"]

GPU_ONLY = ("bf16",)
"""Precisions for which ONNX Runtime has no operators on a CPU."""


def check_device(info: Mapping[str, str], device: str, path: Path) -> None:
    """Refuse a precision that ONNX Runtime does not compute on the device.

    Args:
        info: Metadata of the file.
        device: ``cpu``, ``cuda:0`` …
        path: The file that the error message names.

    Raises:
        SettingError: The artefact is in a precision for GPUs, and the device is the CPU.
    """
    if device == "cpu" and info.get("precision") in GPU_ONLY:
        raise SettingError(
            f"{path} is in {info['precision']}, which ONNX Runtime computes on a GPU only: choose "
            '`device="cuda"`, or export in fp32 or int8 for a CPU.'
        )
