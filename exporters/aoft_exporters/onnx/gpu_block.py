"""Memory of a GPU that is taken from CUDA in one block, and returned when it is dropped.

ONNX Runtime's own allocator rounds a block up to a power of two, and keeps it for the process.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aoft_deploy.artefacts.gpu_recording import RECORDING
from aoft_exporters.onnx.sessions import library

__all__ = ["GpuBlock", "taken"]


class GpuBlock:
    """A block of a GPU's memory.

    The CUDA libraries must be loaded, as they are after a session on a GPU was opened.

    Attributes:
        size: As the argument.
        index: As the argument.

    Args:
        size: Bytes.
        index: The GPU, counted as CUDA counts the visible ones.

    Raises:
        OSError: CUDA has no such block, with its reason.
    """

    def __init__(self, size: int, index: int) -> None:
        self.size, self.index = size, index
        runtime = ctypes.CDLL(f"libcudart.so.{library().cuda_version.partition('.')[0]}")
        self._address = ctypes.c_void_p()
        with _current(runtime, index):
            status = runtime.cudaMalloc(ctypes.byref(self._address), ctypes.c_size_t(size))
        if status:
            runtime.cudaGetLastError()  # or ONNX Runtime would report it as its own
            runtime.cudaGetErrorString.restype = ctypes.c_char_p
            raise OSError(runtime.cudaGetErrorString(status).decode())
        with _LOCK:
            _BLOCKS.add(self)
        weakref.finalize(self, _return, runtime, index, self._address).atexit = False

    def data_ptr(self) -> int:
        """Address of the first byte."""
        return int(self._address.value or 0)


_LOCK = threading.Lock()
_BLOCKS: weakref.WeakSet[GpuBlock] = weakref.WeakSet()


def taken(index: int) -> int:
    """Bytes of a GPU that this process holds in blocks."""
    with _LOCK:
        return sum(block.size for block in _BLOCKS if block.index == index)


@contextmanager
def _current(runtime: Any, index: int) -> Iterator[None]:
    """Context manager: a GPU is the calling thread's current one."""
    before = ctypes.c_int()
    runtime.cudaGetDevice(ctypes.byref(before))
    runtime.cudaSetDevice(index)
    try:
        yield
    finally:
        runtime.cudaSetDevice(before)


def _return(runtime: Any, index: int, address: ctypes.c_void_p) -> None:
    """Free a block in another thread: the calling one may be recording when it collects garbage."""
    threading.Thread(target=_free, args=(runtime, index, address), daemon=True).start()


def _free(runtime: Any, index: int, address: ctypes.c_void_p) -> None:
    with RECORDING.apart(), _current(runtime, index):
        runtime.cudaFree(address)
