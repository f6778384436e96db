"""A GPU's peak speed in matrix products."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from aoft_deploy.artefacts.machine import Product, fastest_rates

__all__ = ["GPU_PRECISIONS", "gpu_gemm_peaks", "gpu_name"]

GPU_PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8", "fp8")
"""Precisions whose peak is measured."""

SIDES = (1024, 2048, 4096, 8192)
"""Sides of the square matrices."""


def gpu_gemm_peaks(
    device: str,
    seconds: float = 6.0,
    *,
    products: Mapping[str, Callable[[int], Product]] | None = None,
    timed: Callable[[Product], float] | None = None,
) -> dict[str, float]:
    """Measure a GPU's peak speed in matrix products in PyTorch, by precision.

    A precision is left out if it is not faster than fp32, or if PyTorch has no kernel for the GPU.

    Args:
        device: ``cuda:0`` …
        seconds: Time limit for the products, exceeded by at most one product of each precision.
        products: Maps each precision, ``fp32`` among them, to a function from a side to a product;
            None means PyTorch's products.
        timed: Computes a product and returns its seconds; None measures with CUDA events.

    Returns:
        Operations per second; for int8, integer operations.
    """
    from torch import backends, cuda

    switch: Any = backends.cuda.matmul
    before = switch.fp32_precision
    with cuda.device(device):
        try:
            return fastest_rates(
                _torch_products(device) if products is None else products,
                seconds,
                SIDES,
                _event_seconds if timed is None else timed,
            )
        finally:
            switch.fp32_precision = before


def gpu_name(device: str) -> str:
    """Name of a GPU that the driver reports."""
    import torch

    return torch.cuda.get_device_name(device)


def _event_seconds(product: Product) -> float:
    from torch import cuda

    start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    start.record()
    product()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _torch_products(device: str) -> dict[str, Callable[[int], Product]]:
    import torch

    generator = torch.Generator(device).manual_seed(0)

    def normal(side: int) -> torch.Tensor:
        return torch.randn(side, side, generator=generator, device=device)

    def floating(side: int, dtype: torch.dtype, fp32_precision: str = "ieee") -> Product:
        switch: Any = torch.backends.cuda.matmul
        switch.fp32_precision = fp32_precision
        matrix = normal(side).to(dtype)
        return lambda: matrix @ matrix

    def integer(side: int) -> Product:
        matrix = torch.randint(
            -63, 64, (side, side), generator=generator, dtype=torch.int8, device=device
        )
        return lambda: torch._int_mm(matrix, matrix.t())

    def eight_bits(side: int) -> Product:
        matrix = normal(side).to(torch.float8_e4m3fn)
        scale = torch.ones((), device=device)
        return lambda: torch._scaled_mm(
            matrix, matrix.t(), scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16
        )

    return {
        "fp32": partial(floating, dtype=torch.float32),
        "tf32": partial(floating, dtype=torch.float32, fp32_precision="tf32"),
        "fp16": partial(floating, dtype=torch.float16),
        "bf16": partial(floating, dtype=torch.bfloat16),
        "int8": integer,
        "fp8": eight_bits,
    }
