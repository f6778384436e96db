"""Memory that is returned to the system after large requests and batches."""

from __future__ import annotations

import contextlib
import ctypes
import os

__all__ = ["return_large_blocks"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGE_BLOCK = FREE_HEAP = 2**20


def return_large_blocks() -> None:
    """Let the C library return blocks of a megabyte or more to the system as soon as they are free.

    glibc does so at first, but raises its threshold to the largest block that was ever freed. After
    the first batch, request bodies and batches would then lie in the heap between small objects,
    and the heap would never shrink. Up to a megabyte of free memory stays at the end of the heap
    for the next body. With another C library, or if ``MALLOC_MMAP_THRESHOLD_`` is set, this does
    nothing.
    """
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        with contextlib.suppress(OSError, AttributeError, TypeError):
            library = ctypes.CDLL(None)
            library.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
            library.mallopt(M_TRIM_THRESHOLD, FREE_HEAP)
