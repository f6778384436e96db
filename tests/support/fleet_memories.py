"""The memories that a fleet's tables may lie in: this process's, a device's, or its stand-in.

The stand-in is the memory of a device, with the CPU as the device.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from aoft_deploy.artefacts.table_memory import HostMemory, TableMemory
from aoft_deploy.fleet.fleet import Fleet
from aoft_exporters.onnx.fleet import DeviceMemory
from aoft_exporters.onnx.gpu_block import GpuBlock
from aoft_exporters.onnx.sessions import library

__all__ = ["MEMORIES", "OpenFleet", "on_gpu", "table_rows"]

OpenFleet = Callable[..., Fleet]

TO_HOST = 2
"""CUDA's number for copies from a device to the host."""

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        "CUDAExecutionProvider" not in library().get_available_providers(),
        reason="needs onnxruntime-gpu and a CUDA device",
    ),
]

MEMORIES: dict[str, Callable[[int], TableMemory]] = {
    "cpu": HostMemory,
    "stand-in": partial(DeviceMemory, device="cpu"),
    "cuda": partial(DeviceMemory, device="cuda"),
}


def table_rows(table: Any, first: int, count: int = 1) -> NDArray[Any]:
    """A copy of some rows of a table, wherever it lies."""
    if isinstance(table, np.ndarray):
        return table[first : first + count].copy()
    shape = (count, *table.shape[1:])
    row = math.prod(table.shape[1:]) * np.dtype(table.dtype).itemsize
    start = table.address - table.memory.data_ptr() + first * row
    content = _content(table.memory, start, count * row)
    return np.frombuffer(content, table.dtype).reshape(shape)


def _content(memory: Any, start: int, size: int) -> bytes:
    """Bytes of a device's memory."""
    if not isinstance(memory, GpuBlock):
        found: bytes = memory.numpy()[start : start + size].tobytes()
        return found
    runtime = ctypes.CDLL(f"libcudart.so.{library().cuda_version.partition('.')[0]}")
    buffer, address = ctypes.create_string_buffer(size), ctypes.c_void_p(memory.data_ptr() + start)
    assert runtime.cudaMemcpy(buffer, address, ctypes.c_size_t(size), TO_HOST) == 0
    return buffer.raw
