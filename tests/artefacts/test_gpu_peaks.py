from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from standin_cuda import Cuda

from aoft_deploy.artefacts import gpu_peaks
from aoft_deploy.artefacts.gpu_peaks import GPU_PRECISIONS, gpu_gemm_peaks

SWITCH: Any = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    before = SWITCH.fp32_precision
    yield
    SWITCH.fp32_precision = before


def at_rates(cuda: Cuda, **rates: float) -> dict[str, Callable[[int], Callable[[], None]]]:
    """Products that queue work on the current stream, by a rate for each precision."""

    def at(rate: float) -> Callable[[int], Callable[[], None]]:
        def make(side: int) -> Callable[[], None]:
            if not rate:
                raise RuntimeError("no kernel for this GPU")
            milliseconds = 1e3 * 2 * side**3 / rate
            return lambda: cuda.current.queue(lambda: None, milliseconds)

        return make

    return {name: at(rate) for name, rate in rates.items()}


def test_the_peaks_are_measured_by_events_and_slower_precisions_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = Cuda(monkeypatch)
    kinds = at_rates(cuda, fp32=5e13, tf32=4e14, fp16=8e14, bf16=4e13, fp8=0)
    found = gpu_gemm_peaks("cuda:0", products=kinds)
    assert found == pytest.approx({"fp32": 5e13, "tf32": 4e14, "fp16": 8e14})


def test_the_time_limit_bounds_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    gpu_gemm_peaks("cuda:0", 0.1, products=at_rates(cuda, fp32=1e12))
    assert cuda.now <= 100


def test_pytorchs_products_run_in_their_precision() -> None:
    products = gpu_peaks._torch_products("cpu")
    assert tuple(products) == GPU_PRECISIONS
    kinds = {}
    for name, make in products.items():
        result: Any = make(64)()
        kinds[name] = result.dtype, SWITCH.fp32_precision if name in ("fp32", "tf32") else None
        assert result.shape == (64, 64)
    assert kinds == {
        "fp32": (torch.float32, "ieee"),
        "tf32": (torch.float32, "tf32"),
        "fp16": (torch.float16, None),
        "bf16": (torch.bfloat16, None),
        "int8": (torch.int32, None),
        "fp8": (torch.bfloat16, None),
    }


def test_pytorchs_precision_of_float32_returns_after_the_measurement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = Cuda(monkeypatch)
    SWITCH.fp32_precision = "tf32"

    def make(side: int) -> Callable[[], None]:
        SWITCH.fp32_precision = "ieee"
        return at_rates(cuda, fp32=1e15)["fp32"](side)

    gpu_gemm_peaks("cuda:0", products={"fp32": make})
    assert SWITCH.fp32_precision == "tf32"
