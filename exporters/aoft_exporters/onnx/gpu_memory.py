"""Free memory of a GPU, from the CUDA driver."""

from __future__ import annotations

import ctypes

from aoft_deploy.errors import SettingError

__all__ = ["free_memory"]


def free_memory(index: int) -> int:
    """Bytes of a GPU's memory that no process uses now.

    Args:
        index: The GPU, counted as CUDA counts the visible ones.

    Raises:
        SettingError: There is no driver or no such GPU.
    """
    device, context = ctypes.c_int(), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        _call(driver.cuInit(0))
        _call(driver.cuDeviceGet(ctypes.byref(device), index))
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


def _call(status: int) -> None:
    """Raise OSError if the driver reports an error."""
    if status:
        raise OSError(f"CUDA driver error {status}")
