"""Sizes and durations with a suitable unit."""

from __future__ import annotations

__all__ = ["duration", "size"]


def size(count: float) -> str:
    """A number of bytes in the largest unit that gives at least 1."""
    if count < 1000:
        return f"{count:.0f} bytes"
    for unit in ("KB", "MB"):
        count /= 1000
        if count < 1000:
            return f"{count:.0f} {unit}" if count >= 100 else f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} GB"


def duration(seconds: float) -> str:
    """A duration in microseconds, milliseconds or seconds."""
    if seconds < 1e-3:
        return f"{1e6 * seconds:.0f} µs"
    return f"{1e3 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"
