"""Load the CUDA libraries that ONNX Runtime needs from the packages that pip installed.

The CUDA provider asks the dynamic loader for cuBLAS, cuDNN and others by name. The loader does not
search the packages ``nvidia-*``, but it finds a library that the process has loaded already.
ONNX Runtime's ``preload_dlls`` looks only beside its own folder, and prints to standard output.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["driver_failure", "load_cuda_libraries", "provider_failure"]

LIBRARIES = {
    "cudart": True,
    "nvJitLink": True,
    "cublasLt": True,
    "cublas": True,
    "nvrtc": True,
    "curand": False,
    "cufft": False,
    "cudnn": False,
}
"""Libraries in the order of their dependencies, and whether their version is that of CUDA."""


def load_cuda_libraries(cuda: str) -> None:
    """Load each library from the first package that has it; absent ones are left to the system.

    Args:
        cuda: Version of CUDA that ONNX Runtime was built for, such as ``13.0``.
    """
    major = cuda.partition(".")[0]
    folders = list(_folders(major, _packages()))
    for name, of_cuda in LIBRARIES.items():
        pattern = f"lib{name}.so.{major if of_cuda else '*'}"
        for path in (path for folder in folders for path in sorted(folder.glob(pattern))):
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(path))
                break


def driver_failure() -> str:
    """Why NVIDIA's driver cannot be loaded; empty if it can."""
    return _failure("libcuda.so.1")


def provider_failure(runtime: Path) -> str:
    """Why the CUDA provider cannot be loaded; empty if it can.

    This is for a provider that ONNX Runtime could not load: loaded here first, it would not find
    ONNX Runtime.

    Args:
        runtime: Folder of the package ``onnxruntime``.
    """
    with contextlib.suppress(OSError):
        shared = runtime / "capi/libonnxruntime_providers_shared.so"
        ctypes.CDLL(str(shared), mode=ctypes.RTLD_GLOBAL)
    return _failure(str(runtime / "capi/libonnxruntime_providers_cuda.so"))


def _failure(library: str) -> str:
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return str(error)
    return ""


def _packages() -> Iterable[Path]:
    """Folders ``nvidia`` in all folders that Python imports from."""
    spec = importlib.util.find_spec("nvidia")
    return map(Path, (spec and spec.submodule_search_locations) or ())


def _folders(major: str, packages: Iterable[Path]) -> Iterator[Path]:
    """Folders with libraries: from CUDA 13 on ``cu13/lib`` first, then ``cudnn/lib`` and others."""
    found = [folder for package in packages for folder in sorted(package.glob("*/lib"))]
    yield from (folder for folder in found if folder.parent.name == f"cu{major}")
    yield from (folder for folder in found if not re.fullmatch(r"cu\d+", folder.parent.name))
