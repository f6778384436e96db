"""The machine that figures are of: its processor, and how fast it multiplies matrices."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from aoft_deploy.processors import processors

__all__ = ["gemm_peaks", "machine"]


SIDES = (256, 512, 1024, 2048)
"""Of the square matrices that the peak is measured with. The largest reuses every cache; where one
would take too long, the smaller ones before it count."""


Product = Callable[[], Any]
"""One product of two square matrices."""


def gemm_peaks(
    threads: int | None = None,
    seconds: float = 6.0,
    *,
    products: Mapping[str, Callable[[int], Product]] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Operations a second that this machine's CPU reaches in large products, by precision.

    The best that PyTorch's libraries reach. A precision is left out unless it is faster than fp32:
    without instructions for it the processor has no limit of its own there, and PyTorch may have
    no kernel at all (int8 on AVX2 takes 25 s for a product that fp32 does in 0.2). int8 is counted
    in integer operations.

    Args:
        threads: None is as many as PyTorch takes.
        seconds: Time for all of it; exceeded by at most one small product of each precision.
        products: From a precision to a function that makes a product from a side; None is
            PyTorch's, with ``fp32`` among them.
        clock: Seconds.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    kinds = _torch_products() if products is None else products
    try:
        rates = {name: _rate(make, seconds / len(kinds), clock) for name, make in kinds.items()}
    finally:
        torch.set_num_threads(before)
    return {n: rate for n, rate in rates.items() if n == "fp32" or rate > rates["fp32"]}


def _torch_products() -> dict[str, Callable[[int], Product]]:
    """Products in PyTorch, by precision."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def real(side: int, kind: torch.dtype) -> Product:
        matrix = torch.randn(side, side, generator=generator).to(kind)
        return lambda: matrix @ matrix

    def whole(side: int) -> Product:
        matrix = torch.randint(-63, 64, (side, side), generator=generator, dtype=torch.int8)
        return lambda: torch._int_mm(matrix, matrix)

    return {
        "fp32": partial(real, kind=torch.float32),
        "bf16": partial(real, kind=torch.bfloat16),
        "int8": whole,
    }


def _rate(make: Callable[[int], Product], seconds: float, clock: Callable[[], float]) -> float:
    """Operations a second of the best product, of growing ones for as long as there is time."""
    start, best = clock(), 0.0
    for side in SIDES:
        operations, product = 2 * side**3, make(side)
        for _ in range(REPEATS if side == SIDES[-1] else 2):
            begin = clock()
            if best and begin - start + operations / best > seconds:
                return best
            product()
            best = max(best, operations / (clock() - begin))
    return best


def machine(threads: int | None) -> dict[str, Any]:
    """Where the figures come from."""
    return {"processor": _processor(), "cores": processors(), "threads": threads}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    return " ".join((names or [platform.processor() or platform.machine()])[0].split())


REPEATS = 8
"""Products of the largest size; of a smaller one two, of which the first may set things up."""
