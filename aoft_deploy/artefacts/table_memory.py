"""Memory from which an engine reads the tables of a fleet's tasks."""

from __future__ import annotations

import math
import mmap
import os
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from aoft_deploy.errors import SettingError

__all__ = ["HostMemory", "TableMemory", "physical_memory"]

NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
SPARE = 2
"""Address space beyond the reserved size, as a multiple of it, for gaps between classifiers."""


class TableMemory(Protocol):
    """Memory that never moves, so an engine may read it while other threads write elsewhere.

    Attributes:
        size: Its bytes: those that were asked for, and more for gaps between classifiers.
    """

    size: int

    def table(self, offset: int, shape: Sequence[int], dtype: DTypeLike) -> Any:
        """A table in this memory, in the form that ``FleetEngine.run`` takes.

        Args:
            offset: Its first byte, a multiple of 8.
            shape: Its shape. Tables may overlap.
            dtype: Type of its values.
        """

    def write(self, offset: int, values: NDArray[Any]) -> None:
        """Copy values to a place; when this returns, the engine can read them. Thread-safe.

        Args:
            offset: First byte of the place.
            values: The values, copied as bytes.
        """

    def release(self, start: int, end: int) -> None:
        """Return the memory between two bytes to the system, if it can be; the values are lost."""


class HostMemory:
    """Address space of this process; a page takes no memory before it is written or once released.

    Attributes:
        size: See ``TableMemory``.

    Args:
        size: Bytes that are needed.

    Raises:
        SettingError: The system does not reserve them.
    """

    def __init__(self, size: int) -> None:
        self.size = size + SPARE * size
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
        try:
            self._map = mmap.mmap(-1, self.size, flags=flags)
        except (OSError, OverflowError) as error:
            raise SettingError(
                f"The system does not reserve {size} bytes for tasks ({error}): give a smaller "
                "`budget`."
            ) from error
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self._bytes = np.frombuffer(self._map, np.uint8)

    def table(self, offset: int, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """An array in this memory; see ``TableMemory``."""
        return np.frombuffer(self._map, dtype, math.prod(shape), offset).reshape(shape)

    def write(self, offset: int, values: NDArray[Any]) -> None:
        """Copy values to a place; see ``TableMemory``."""
        self._bytes[offset : offset + values.nbytes] = values.reshape(-1).view(np.uint8)

    def release(self, start: int, end: int) -> None:
        """Return all pages that lie entirely between two bytes to the system."""
        start, end = (
            -(start // -mmap.PAGESIZE) * mmap.PAGESIZE,
            end // mmap.PAGESIZE * mmap.PAGESIZE,
        )
        if start < end and sys.platform == "linux":
            self._map.madvise(mmap.MADV_DONTNEED, start, end - start)


def physical_memory() -> int:
    """Memory of this machine, in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
