"""Sizes and durations with a suitable unit."""

from __future__ import annotations

from decimal import Decimal

__all__ = ["decimal", "duration", "size"]


def size(count: float) -> str:
    """A number of bytes in the largest unit that gives at least 1."""
    if count < 1000:
        return f"{count:.0f} bytes"
    for unit in ("KB", "MB"):
        count /= 1000
        if count < 1000:
            return f"{count:.0f} {unit}" if count >= 100 else f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} GB"


def decimal(value: float, digits: int = 2) -> str:
    """A number with so many significant digits and without an exponent, such as 0.000023."""
    return f"{Decimal(f'{value:.{digits}g}'):f}"


def duration(seconds: float) -> str:
    """A duration in microseconds, milliseconds or seconds."""
    if seconds < 1e-3:
        return f"{1e6 * seconds:.0f} µs"
    return f"{1e3 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"
