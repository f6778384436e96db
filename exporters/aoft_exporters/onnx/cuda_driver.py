"""What the CUDA driver knows of a GPU: its name and its free memory."""

from __future__ import annotations

import ctypes
from typing import Any

from aoft_deploy.errors import SettingError

__all__ = ["free_memory", "gpu_name"]

LONGEST_NAME = 256
"""Bytes of a GPU's name, with the zero that ends it."""


def gpu_name(index: int) -> str | None:
    """Name of a GPU; None if there is no driver or no such GPU.

    Args:
        index: The GPU, counted as CUDA counts the visible ones.
    """
    name = ctypes.create_string_buffer(LONGEST_NAME)
    try:
        driver, device = _opened(index)
        _call(driver.cuDeviceGetName(name, LONGEST_NAME, device))
    except OSError:
        return None
    return name.value.decode(errors="replace")


def free_memory(index: int) -> int:
    """Bytes of a GPU's memory that no process uses now.

    Args:
        index: The GPU, counted as CUDA counts the visible ones.

    Raises:
        SettingError: There is no driver or no such GPU.
    """
    context, free, total = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
    try:
        driver, device = _opened(index)
        _call(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
        try:
            _call(driver.cuCtxPushCurrent_v2(context))
            try:
                _call(driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)))
            finally:
                driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
        finally:
            driver.cuDevicePrimaryCtxRelease_v2(device)
    except OSError as error:
        raise SettingError(
            f"The free memory of GPU {index} is not known ({error}): give a `budget`."
        ) from error
    return free.value


def _opened(index: int) -> tuple[Any, ctypes.c_int]:
    """The driver, and its handle of a GPU.

    Raises:
        OSError: There is no driver or no such GPU.
    """
    driver, device = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    _call(driver.cuInit(0))
    _call(driver.cuDeviceGet(ctypes.byref(device), index))
    return driver, device


def _call(status: int) -> None:
    """Raise OSError if the driver reports an error."""
    if status:
        raise OSError(f"CUDA driver error {status}")
