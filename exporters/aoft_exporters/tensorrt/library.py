"""Find the GPU and choose between TensorRT and TensorRT-RTX.

Both have the same Python interface. ``tensorrt`` builds and runs on this machine's GPU and is
preferred if there is one. ``tensorrt-rtx`` also builds without a GPU, for a named compute
capability.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from dataclasses import dataclass
from typing import Any

from aoft_deploy.errors import SettingError, optional_imports

__all__ = ["Gpu", "Library", "Target", "find_gpu", "library", "target"]


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine.

    Attributes:
        name: Name that the driver reports.
        capability: Compute capability, such as ``8.9``.
    """

    name: str
    capability: str


@dataclass(frozen=True)
class Library:
    """An installed TensorRT.

    Attributes:
        module: The Python module.
        name: ``tensorrt`` or ``tensorrt-rtx``.
        version: Its version; engines run in the same version only.
        log: Logger of its objects; ``errors`` holds the error messages, ``reason()`` sums them up.
    """

    module: Any
    name: str
    version: str
    log: Any


@dataclass(frozen=True)
class Target:
    """The library that builds an engine and the GPU that it is built for.

    Attributes:
        library: The TensorRT.
        capability: Compute capability, such as ``8.9``.
    """

    library: Library
    capability: str


def find_gpu(index: int = 0) -> Gpu | None:
    """A GPU of this machine; None if CUDA has no GPU of this index."""
    import torch

    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return None
    major, minor = torch.cuda.get_device_capability(index)
    return Gpu(torch.cuda.get_device_name(index), f"{major}.{minor}")


def library(name: str | None = None) -> Library:
    """Import an installed TensorRT.

    Args:
        name: ``tensorrt`` or ``tensorrt-rtx``; None prefers ``tensorrt`` if there is a GPU.

    Raises:
        MissingExtraError: The library is not installed.
    """
    with optional_imports():
        if name is None and find_gpu():
            with contextlib.suppress(ImportError):
                return _library("tensorrt")
        return _library(name or "tensorrt-rtx")


@functools.cache
def _library(name: str) -> Library:
    """Import once per process: TensorRT keeps the first logger that it is given."""
    module: Any = importlib.import_module(name.replace("-", "_"))

    class Log(module.ILogger):  # type: ignore[misc]
        """Collects errors and drops other messages."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            """Record a message; TensorRT calls this."""
            if severity in (module.ILogger.Severity.ERROR, module.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))

        def reason(self, default: str = "no reason given") -> str:
            """The beginning of the error messages, or a default without any."""
            return " ".join(self.errors)[:200] or default

    return Library(module, name, str(module.__version__), Log())


def target(capability: str | None) -> Target:
    """Choose the library to build with and the GPU to build for.

    Args:
        capability: Compute capability to build for; None is that of this machine's GPU.

    Raises:
        MissingExtraError: Neither TensorRT nor TensorRT-RTX is installed.
        SettingError: The GPU is neither present nor named, or the installed TensorRT cannot build
            for it.
    """
    gpu, chosen = find_gpu(), library()
    if capability is None and gpu is None:
        raise SettingError(
            "This machine has no NVIDIA GPU: name the one to build for with `compute_capability`, "
            f"one of {', '.join(_capabilities(chosen.module))}."
        )
    wanted = capability or (gpu.capability if gpu else "")
    if chosen.name == "tensorrt":
        if gpu and wanted != gpu.capability:
            raise SettingError(
                f"tensorrt builds for this machine's GPU, of compute capability {gpu.capability}, "
                f"not for {wanted}: leave `compute_capability` out."
            )
    elif wanted not in _capabilities(chosen.module):
        if gpu and capability is None:
            raise SettingError(
                f"tensorrt-rtx {chosen.version} does not build for this machine's {gpu.name} of "
                f"compute capability {wanted}, but for {', '.join(_capabilities(chosen.module))}: "
                "install NVIDIA's tensorrt, or export to onnx."
            )
        raise SettingError(
            f"tensorrt-rtx {chosen.version} does not build for compute capability {wanted}, but "
            f"for {', '.join(_capabilities(chosen.module))}: choose one of these, or build with "
            "tensorrt on a machine with the GPU."
        )
    return Target(chosen, wanted)


def _capabilities(module: Any) -> dict[str, Any]:
    """Compute capabilities that TensorRT-RTX can build for, by names such as ``8.9``."""
    members = getattr(module, "ComputeCapability", None)
    named = members.__members__ if members else {}
    return {f"{n[2:-1]}.{n[-1]}": value for n, value in named.items() if n.startswith("SM")}
