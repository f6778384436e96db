"""Memory that batches leave behind."""

from __future__ import annotations

import contextlib
import ctypes
import os

__all__ = ["give_large_blocks_back"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGE = SPARE = 2**20


def give_large_blocks_back() -> None:
    """Have the C library return blocks of a megabyte and more as soon as they are free.

    glibc does so at first, but raises that size to the largest block that was ever freed: after the
    first batch, bodies and batches lie in its heap between small objects, which then never shrinks.
    Some free memory at the heap's end stays, so that the next body finds its pages there.
    Where another C library is used, or ``MALLOC_MMAP_THRESHOLD_`` is set, nothing is changed.
    """
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        with contextlib.suppress(OSError, AttributeError, TypeError):
            library = ctypes.CDLL(None)
            library.mallopt(M_MMAP_THRESHOLD, LARGE)
            library.mallopt(M_TRIM_THRESHOLD, SPARE)
