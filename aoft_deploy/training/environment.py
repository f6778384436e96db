"""Context managers of a run: deterministic kernels, and the TensorBoard writer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from aoft_deploy.errors import optional_imports

__all__ = ["deterministic", "tensorboard_writer"]


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
