"""ONNX Runtime's CUDA provider on a machine without a GPU, with CUDA libraries that do nothing.

The provider itself is real: it places the nodes, allocates, records and replays. Only the numbers
that it computes mean nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("cuda_on_host.c")
RUNTIME = Path(sys.prefix) / "onnxruntime-gpu"
"""Where ``make test`` installs onnxruntime-gpu, which cannot be beside onnxruntime."""

LIBRARIES = {
    "CUDART": "nvidia/cu13/lib/libcudart.so.13",
    "CUBLAS": "nvidia/cu13/lib/libcublas.so.13",
    "CUBLASLT": "nvidia/cu13/lib/libcublasLt.so.13",
    "CURAND": "nvidia/cu13/lib/libcurand.so.10",
    "CUDNN": "nvidia/cudnn/lib/libcudnn.so.9",
}


@dataclass(frozen=True)
class CudaOnHost:
    """Folders with the libraries.

    Attributes:
        driver: Holds a driver without a device.
        packages: Holds the other libraries, as pip's packages do.
    """

    driver: Path
    packages: Path

    def run(
        self, code: str, *arguments: object, driver: bool = True, device: bool = True, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run Python code with onnxruntime-gpu in a subprocess.

        Args:
            code: The code.
            arguments: Its arguments.
            driver: Whether there is a driver.
            device: Whether the other libraries are those of this folder, which have a device,
                instead of NVIDIA's.
            env: Further environment variables.
        """
        path = [str(RUNTIME), *([str(self.packages)] if device else [])]
        environment = {**os.environ, **env, "PYTHONPATH": os.pathsep.join(path)}
        environment["LD_LIBRARY_PATH"] = str(self.driver) if driver else ""
        command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
        return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=120)


def cuda_on_host(folder: Path) -> CudaOnHost:
    """Compile the libraries, or skip the test where that is impossible."""
    provider = RUNTIME / "onnxruntime/capi/libonnxruntime_providers_cuda.so"
    if not provider.is_file():
        pytest.skip(f"make test installs onnxruntime-gpu in {RUNTIME}, where it is missing")
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc to compile CUDA libraries with")
    made = CudaOnHost(folder / "driver", folder / "packages")
    _compile("CUDA", made.driver / "libcuda.so.1", set())
    needed = _needed(provider)
    for part, path in LIBRARIES.items():
        _compile(part, made.packages / path, needed.get(Path(path).name, set()))
    return made


def _needed(provider: Path) -> dict[str, set[str]]:
    """Names of the functions that the provider takes from each library."""
    listing = subprocess.run(
        ["readelf", "--dyn-syms", "--wide", provider], text=True, capture_output=True, check=True
    ).stdout
    needed: dict[str, set[str]] = {}
    for name, library in re.findall(r" UND (\w+)@(lib\S+)", listing):
        needed.setdefault(library, set()).add(name)
    found = re.findall(rb"cudnn[A-Z]\w+(?=\0)", provider.read_bytes())  # it asks dlsym for them
    needed["libcudnn.so.9"] = {name.decode() for name in found}
    return needed


def _compile(part: str, path: Path, needed: set[str]) -> None:
    """Compile a part of the source; further functions return success."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source = SOURCE.read_text("utf-8")
    further = sorted(name for name in needed if not re.search(rf"\b{name}\(", source))
    text = source + "\n" + "\n".join(f"int {name}() {{ return 0; }}" for name in further)
    versions = path.with_suffix(".map")
    versions.write_text(f"{path.name} {{ global: *; }};", "utf-8")
    options = ["-std=gnu11", "-w", "-shared", "-fPIC", f"-D{part}", f"-Wl,-soname,{path.name}"]
    command = ["gcc", *options, f"-Wl,--version-script={versions}", "-xc", "-", "-o", str(path)]
    subprocess.run(command, input=text, text=True, check=True)
