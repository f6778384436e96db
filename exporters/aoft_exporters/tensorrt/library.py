"""TensorRT or TensorRT-RTX, whichever this machine can use, and the GPU it finds.

Both have the same Python interface. ``tensorrt`` builds and runs on the GPU at hand and is taken
where there is one; ``tensorrt-rtx`` also builds without any, for a named compute capability.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

from aoft_deploy.errors import MissingExtraError, SettingError

__all__ = ["Gpu", "Library", "Target", "find_gpu", "library", "target"]


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine.

    Attributes:
        name: As its driver reports it.
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
        version: Its version; engines are for this one alone.
        log: What its objects write to; ``errors`` holds the texts of errors.
    """

    module: Any
    name: str
    version: str
    log: Any


@dataclass(frozen=True)
class Target:
    """What an engine is built with, and for which GPUs.

    Attributes:
        library: The TensorRT.
        capability: Compute capability, such as ``8.9``.
    """

    library: Library
    capability: str


def find_gpu(index: int = 0) -> Gpu | None:
    """One of this machine's GPUs, if there is one that CUDA can use."""
    import torch

    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return None
    major, minor = torch.cuda.get_device_capability(index)
    return Gpu(torch.cuda.get_device_name(index), f"{major}.{minor}")


def library(name: str | None = None) -> Library:
    """An installed TensorRT.

    Args:
        name: ``tensorrt`` or ``tensorrt-rtx``; None takes the first where there is a GPU.

    Raises:
        MissingExtraError: It is not installed.
    """
    choices = [name] if name else ["tensorrt", "tensorrt-rtx"] if find_gpu() else ["tensorrt-rtx"]
    for choice in choices:
        try:
            return _library(choice)
        except ImportError:
            continue
    raise MissingExtraError(choices[-1], "gpu" if choices[-1] == "tensorrt-rtx" else "tensorrt")


@functools.cache
def _library(name: str) -> Library:
    """One for the whole process: TensorRT keeps the first log that it is given."""
    module: Any = importlib.import_module(name.replace("-", "_"))

    class Log(module.ILogger):  # type: ignore[misc]
        """Keeps errors and drops the rest, which TensorRT would print."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            """Called by TensorRT."""
            if severity in (module.ILogger.Severity.ERROR, module.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))

    return Library(module, name, str(module.__version__), Log())


def target(capability: str | None) -> Target:
    """What to build with and for.

    Args:
        capability: Compute capability to build for; None is this machine's GPU's.

    Raises:
        MissingExtraError: Neither TensorRT nor TensorRT-RTX is installed.
        SettingError: No GPU and none named, or one that the installed TensorRT cannot build for.
    """
    gpu, chosen = find_gpu(), library()
    if capability is None and gpu is None:
        raise SettingError(
            "This machine has no NVIDIA GPU: name the one to build for with `compute_capability`, "
            f"one of {', '.join(_capabilities(chosen.module))}."
        )
    asked = capability or (gpu.capability if gpu else "")
    if chosen.name == "tensorrt":
        if gpu and asked != gpu.capability:
            raise SettingError(
                f"tensorrt builds for this machine's GPU, of compute capability {gpu.capability}, "
                f"not for {asked}: leave `compute_capability` out."
            )
    elif asked not in _capabilities(chosen.module):
        raise SettingError(
            f"tensorrt-rtx {chosen.version} does not build for compute capability {asked}, but for "
            f"{', '.join(_capabilities(chosen.module))}: choose one of these, or build with "
            "tensorrt on a machine with the GPU."
        )
    return Target(chosen, asked)


def _capabilities(module: Any) -> dict[str, Any]:
    """What TensorRT-RTX builds for, by name such as ``8.9``."""
    members = getattr(module, "ComputeCapability", None)
    named = members.__members__ if members else {}
    return {f"{n[2:-1]}.{n[-1]}": value for n, value in named.items() if n.startswith("SM")}
