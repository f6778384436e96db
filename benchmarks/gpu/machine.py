"""The machine: device, driver, versions, and the GPU's peak in matrix products."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch

from aoft_deploy.artefacts.machine import machine
from aoft_deploy.export.flops import flops_per_image
from benchmarks.gpu.models import large, plain
from benchmarks.gpu.run import NotMeasured, Run
from benchmarks.gpu.timing import Variant, interleaved

__all__ = ["describe"]

PACKAGES = (
    *("torch", "timm", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx"),
    *("peft", "transformers", "triton", "numpy"),
)


def describe(run: Run) -> None:
    """Name the machine and its software, and measure its peaks."""
    name = "CPU (dry run)" if run.dry else torch.cuda.get_device_name(0)
    run.note(
        "machine",
        device=name,
        dry=run.dry,
        capability=None if run.dry else ".".join(map(str, torch.cuda.get_device_capability(0))),
        driver=None if run.dry else _driver(),
        cuda=torch.version.cuda,
        python=sys.version.split()[0],
        flops=flops_per_image(plain(large(run)), large(run).side),
        versions={package: found for package in PACKAGES if (found := _version(package))},
        **{key: value for key, value in machine(None).items() if key != "threads"},
    )
    side = 64 if run.dry else 8192
    for precision, make in PRODUCTS.items():
        with run.row(f"peak {precision}"):
            timing = interleaved(run, {precision: Variant(make(side, run.device))})[precision]
            seconds = (timing.device_ms or timing.ms) / 1e3
            run.note(
                f"peak {precision}",
                kind="peak",
                precision=precision,
                per_second=2 * side**3 / seconds,
            )


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version,memory.total,clocks.max.sm"]
    with contextlib.suppress(FileNotFoundError):
        done = subprocess.run([*query, "--format=csv,noheader"], capture_output=True, text=True)
        return done.stdout.strip()
    return "unknown"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _product(dtype: torch.dtype, tf32: bool = False) -> Callable[[int, str], Callable[[], object]]:
    def make(side: int, device: str) -> Callable[[], object]:
        matrix = torch.randn(side, side, device=device).to(dtype)

        def run() -> object:
            torch.backends.cuda.matmul.allow_tf32 = tf32
            return matrix @ matrix

        return run

    return make


def _fp8(side: int, device: str) -> Callable[[], object]:
    if device == "cpu":
        raise NotMeasured("PyTorch has no fast product in fp8 on a CPU")
    matrix = torch.randn(side, side, device=device).to(torch.float8_e4m3fn)
    scale = torch.ones((), device=device)
    return lambda: torch._scaled_mm(
        matrix, matrix.T, scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16
    )


PRODUCTS: dict[str, Callable[[int, str], Callable[[], object]]] = {
    "fp32": _product(torch.float32),
    "tf32": _product(torch.float32, tf32=True),
    "fp16": _product(torch.float16),
    "bf16": _product(torch.bfloat16),
    "fp8": _fp8,
}
