"""What a run sets: deterministic kernels, the TensorBoard writer, and the memory allocator."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from aoft_deploy.errors import optional_imports

__all__ = ["deterministic", "keep_freed_memory", "tensorboard_writer"]

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's ``mallopt``."""


def keep_freed_memory() -> None:
    """Make this process keep the memory that a step frees for the next step.

    By default, glibc returns the activations of each step to the system, which clears every page
    again in the next step. Nothing changes with other C libraries.
    """
    try:
        set_parameter = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    set_parameter(MMAP_THRESHOLD, 32 << 20)  # glibc's largest
    set_parameter(TRIM_THRESHOLD, (1 << 31) - 1)


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Make a GPU use deterministic algorithms where they exist."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


@contextmanager
def tensorboard_writer(
    out: Path, done: int, enabled: bool
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Give a function that logs the metrics of an epoch.

    Args:
        out: Folder of the log.
        done: Number of finished epochs; log entries of later epochs are discarded.
        enabled: If false, the function does nothing.

    Raises:
        MissingExtraError: TensorBoard is not installed.
    """
    if not enabled:
        yield lambda line: None
        return
    with optional_imports():
        from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(out, purge_step=done + 1) as writer:

        def log(line: Mapping[str, Any]) -> None:
            for name, value in line.items():
                if name != "epoch" and value is not None:
                    writer.add_scalar(name, value, line["epoch"])

        yield log
