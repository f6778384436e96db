"""What the C library does with large blocks of memory that are freed: keep or return them.

New memory is slow: the system clears each page at its first use, which takes as long as reading the
page's content three times over. Kept memory is fast, but stays with the process.

These functions change the whole process, so only commands call them. With another C library than
glibc, or if ``MALLOC_MMAP_THRESHOLD_`` is set, they do nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

__all__ = ["keep_large_blocks", "keeping_large_blocks", "return_large_blocks"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGE_BLOCK = FREE_HEAP = 2**20
LARGEST_BLOCK = 2**25
"""Largest ``M_MMAP_THRESHOLD`` that glibc accepts."""
NEVER = 2**31 - 1

_returned = False


def keep_large_blocks() -> None:
    """Let the C library keep freed blocks of up to 32 MiB, for a process that ends soon.

    An engine that is opened reads each weight, and writes it in the order of its kernels. Here the
    second copy takes the memory that the first copies of other weights left. A training step takes
    the memory that the activations of the last one left.
    """
    _set(LARGEST_BLOCK, NEVER)


def return_large_blocks() -> None:
    """Let the C library return blocks of a megabyte or more to the system as soon as they are free.

    glibc does so at first, but raises its threshold to the largest block that was ever freed. After
    the first batch, request bodies and batches would then lie in the heap between small objects,
    and the heap would never shrink. Up to a megabyte of free memory stays at the end of the heap
    for the next body.
    """
    global _returned
    _returned = True
    _set(LARGE_BLOCK, FREE_HEAP)


@contextlib.contextmanager
def keeping_large_blocks() -> Iterator[None]:
    """Context manager: as ``keep_large_blocks``; at the end, all free memory is returned.

    It has an effect only after ``return_large_blocks``, which applies again at the end.
    """
    if not _returned:
        yield
        return
    keep_large_blocks()
    try:
        yield
    finally:
        return_large_blocks()
        with contextlib.suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(None).malloc_trim(0)


def _set(block: int, heap: int) -> None:
    """Set the size from which blocks are returned, and that of free memory at the heap's end."""
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        with contextlib.suppress(OSError, AttributeError, TypeError):
            library = ctypes.CDLL(None)
            library.mallopt(M_MMAP_THRESHOLD, block)
            library.mallopt(M_TRIM_THRESHOLD, heap)
