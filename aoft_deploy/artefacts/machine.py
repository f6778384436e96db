"""The machine's processor, and its peak speed in matrix products."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from aoft_deploy.processors import processors

__all__ = ["PRECISIONS", "Product", "fastest_rates", "gemm_peaks", "machine"]

PRECISIONS = ("fp32", "bf16", "int8")
"""Precisions whose peak is measured."""

SIDES = (256, 512, 1024, 2048)
"""Sides of the square matrices of the peak measurement. Sides that would take too long are skipped.
"""

REPEATS = 8
"""Number of products of the largest side; the other sides get 2, as the first may be slower."""

Product = Callable[[], Any]
"""Computes one product of two square matrices."""


def gemm_peaks(
    threads: int | None = None,
    seconds: float = 6.0,
    *,
    products: Mapping[str, Callable[[int], Product]] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Measure this CPU's peak speed in matrix products in PyTorch, by precision.

    A precision that is not faster than fp32 is left out: the CPU has no instructions for it, and
    PyTorch may have no kernel (int8 on AVX2 takes 25 s for a product that takes 0.2 s in fp32).

    Args:
        threads: Number of threads; None keeps PyTorch's setting.
        seconds: Time limit, exceeded by at most one small product of each precision.
        products: Maps each precision, ``fp32`` among them, to a function from a side to a product;
            None means PyTorch's products.
        clock: Returns the time in seconds.

    Returns:
        Operations per second; for int8, integer operations.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    kinds = _torch_products() if products is None else products

    def timed(product: Product) -> float:
        start = clock()
        product()
        return clock() - start

    try:
        return fastest_rates(kinds, seconds, SIDES, timed)
    finally:
        torch.set_num_threads(before)


def fastest_rates(
    kinds: Mapping[str, Callable[[int], Product]],
    seconds: float,
    sides: Sequence[int],
    timed: Callable[[Product], float],
) -> dict[str, float]:
    """Operations per second of each precision's fastest product, if faster than fp32's.

    Args:
        kinds: Maps each precision, ``fp32`` among them, to a function from a side to a product. One
            that raises ``RuntimeError`` is left out.
        seconds: Time limit, exceeded by at most one small product of each precision.
        sides: Sides of the square matrices, in rising order.
        timed: Computes a product and returns its seconds.
    """
    rates = {}
    for name, make in kinds.items():
        try:
            rates[name] = _rate(make, seconds / len(kinds), sides, timed)
        except RuntimeError:
            if name == "fp32":
                raise
    return {n: rate for n, rate in rates.items() if n == "fp32" or rate > rates["fp32"]}


def machine(threads: int | None) -> dict[str, Any]:
    """Describe the machine that a measurement ran on."""
    return {"processor": _processor(), "cores": processors(), "threads": threads}


def _torch_products() -> dict[str, Callable[[int], Product]]:
    import torch

    generator = torch.Generator().manual_seed(0)

    def floating(side: int, dtype: torch.dtype) -> Product:
        matrix = torch.randn(side, side, generator=generator).to(dtype)
        return lambda: matrix @ matrix

    def integer(side: int) -> Product:
        matrix = torch.randint(-63, 64, (side, side), generator=generator, dtype=torch.int8)
        return lambda: torch._int_mm(matrix, matrix)

    return {
        "fp32": partial(floating, dtype=torch.float32),
        "bf16": partial(floating, dtype=torch.bfloat16),
        "int8": integer,
    }


def _rate(
    make: Callable[[int], Product],
    seconds: float,
    sides: Sequence[int],
    timed: Callable[[Product], float],
) -> float:
    """Operations per second of the fastest product. The side grows until the time is used up."""
    used, best = 0.0, 0.0
    for side in sides:
        operations, product = 2 * side**3, make(side)
        for _ in range(REPEATS if side == sides[-1] else 2):
            if best and used + operations / best > seconds:
                return best
            taken = timed(product)
            used, best = used + taken, max(best, operations / taken)
    return best


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    return " ".join((names or [platform.processor() or platform.machine()])[0].split())
